//! Python's literals, as far as models write them for arguments: strings, numbers, `True`, `False`, `None`, lists, tuples and dicts.

use serde_json::{Map, Number, Value};
use std::{iter::Peekable, str::Chars};

/// Deepest nesting that is read.
const MAX_DEPTH: usize = 64;

/// Reads one literal; `None` if it is none.
pub(super) fn value(text: &str) -> Option<Value> {
    let mut reader = Reader { chars: text.chars().peekable() };
    let value = reader.value(0)?;
    reader.blanks();
    reader.chars.next().is_none().then_some(value)
}

struct Reader<'a> {
    chars: Peekable<Chars<'a>>,
}

impl Reader<'_> {
    fn blanks(&mut self) {
        while self.chars.next_if(|c| c.is_whitespace()).is_some() {}
    }

    fn value(&mut self, depth: usize) -> Option<Value> {
        self.blanks();
        match *self.chars.peek()? {
            _ if depth > MAX_DEPTH => None,
            '\'' | '"' => self.string().map(Value::from),
            '[' => self.list(']', depth),
            '(' => self.list(')', depth),
            '{' => self.dict(depth),
            _ => self.word(),
        }
    }

    fn list(&mut self, close: char, depth: usize) -> Option<Value> {
        self.chars.next();
        let mut items = Vec::new();
        loop {
            self.blanks();
            if self.chars.next_if_eq(&close).is_some() {
                return Some(items.into());
            }
            items.push(self.value(depth + 1)?);
            self.comma(close)?;
        }
    }

    fn dict(&mut self, depth: usize) -> Option<Value> {
        self.chars.next();
        let mut entries = Map::new();
        loop {
            self.blanks();
            if self.chars.next_if_eq(&'}').is_some() {
                return Some(entries.into());
            }
            // JSON's keys are strings.
            let key = match self.value(depth + 1)? {
                Value::String(key) => key,
                Value::Number(key) => key.to_string(),
                _ => return None,
            };
            self.blanks();
            self.chars.next_if_eq(&':')?;
            entries.insert(key, self.value(depth + 1)?);
            self.comma('}')?;
        }
    }

    /// Takes a comma, or sees the end.
    fn comma(&mut self, close: char) -> Option<()> {
        self.blanks();
        (self.chars.next_if_eq(&',').is_some() || self.chars.peek() == Some(&close)).then_some(())
    }

    fn string(&mut self) -> Option<String> {
        let quote = self.chars.next()?;
        let mut text = String::new();
        loop {
            match self.chars.next()? {
                c if c == quote => return Some(text),
                '\\' => self.escape(&mut text)?,
                c => text.push(c),
            }
        }
    }

    fn escape(&mut self, text: &mut String) -> Option<()> {
        let c = match self.chars.next()? {
            'n' => '\n',
            't' => '\t',
            'r' => '\r',
            'b' => '\u{8}',
            'f' => '\u{c}',
            'a' => '\u{7}',
            'v' => '\u{b}',
            '0' => '\0',
            '\n' => return Some(()),
            c @ ('\\' | '\'' | '"') => c,
            'x' => self.code(2)?,
            'u' => self.code(4)?,
            'U' => self.code(8)?,
            other => {
                // Python leaves what it does not know as it is.
                text.push('\\');
                other
            }
        };
        text.push(c);
        Some(())
    }

    fn code(&mut self, digits: usize) -> Option<char> {
        let mut code = 0;
        for _ in 0..digits {
            code = code * 16 + self.chars.next()?.to_digit(16)?;
        }
        char::from_u32(code)
    }

    fn word(&mut self) -> Option<Value> {
        let mut word = String::new();
        while let Some(c) = self.chars.next_if(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.' | '_')) {
            word.push(c);
        }
        match word.as_str() {
            "True" | "true" => Some(true.into()),
            "False" | "false" => Some(false.into()),
            "None" | "null" => Some(Value::Null),
            number => self::number(number),
        }
    }
}

fn number(word: &str) -> Option<Value> {
    let word = word.strip_prefix('+').unwrap_or(word).replace('_', "");
    if let Ok(whole) = word.parse::<i64>() {
        return Some(whole.into());
    }
    // `nan` and `inf` are floats to Rust, names to Python, and nothing to JSON.
    let float = word.parse::<f64>().ok().filter(|_| word.contains(|c: char| c.is_ascii_digit()))?;
    Number::from_f64(float).map(Value::Number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn literals_are_read_as_python_does() {
        let check = |text: &str, expected: Option<Value>| assert_eq!(value(text), expected, "{text}");
        check(r"'it\'s \x41 \u00e9 \d'", Some(json!("it's A é \\d")));
        check(r#" "a\nb" "#, Some(json!("a\nb")));
        check("[1, -2.5, 1e3, True, None,]", Some(json!([1, -2.5, 1000.0, true, null])));
        check("(1, 'a')", Some(json!([1, "a"])));
        check("{'a': {\"b\": []}, 1: ()}", Some(json!({"a": {"b": []}, "1": []})));
        check("18446744073709551616", Some(json!(18_446_744_073_709_551_616.0)));
        for bad in ["", "x", "nan", "inf", "[1", "[1 2]", "{'a'}", "'a", "1 2", "'\\x4'", "f(1)", "{[]: 1}"] {
            check(bad, None);
        }
        check(&"[".repeat(100_000), None);
    }
}
