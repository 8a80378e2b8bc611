//! EBNF of the GBNF kind (llama.cpp, xgrammar: `root ::= "a" [0-9]+ rule`), written as Lark.

use std::{fmt::Write, iter::Peekable, str::Chars};

/// Says whether `text` defines rules the EBNF way.
pub(crate) fn is_ebnf(text: &str) -> bool {
    text.lines().any(|line| {
        line.split_once("::=").is_some_and(|(name, _)| {
            let name = name.trim();
            !name.is_empty() && name.chars().all(is_name)
        })
    })
}

/// Writes `text` as a Lark literal.
pub(crate) fn quote(text: &str) -> String {
    serde_json::Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}

/// Translates. `root` becomes `start`; errors name the line.
pub(crate) fn to_lark(text: &str) -> Result<String, String> {
    let mut reader = Reader { chars: text.chars().peekable(), line: 1, out: String::new(), depth: 0 };
    reader.rules().map_err(|problem| format!("line {}: {problem}", reader.line))?;
    Ok(reader.out)
}

/// Deepest nesting of groups.
const MAX_DEPTH: usize = 64;

struct Reader<'a> {
    chars: Peekable<Chars<'a>>,
    line: usize,
    out: String,
    depth: usize,
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '-' || c == '_'
}

/// Lark rules are lower case and know no dashes; what is added keeps different names apart.
fn lark_name(name: &str) -> String {
    if name == "root" {
        return "start".into();
    }
    let mut out = String::from("r_");
    for c in name.chars() {
        match c {
            'a'..='z' | '0'..='9' => out.push(c),
            c => write!(out, "_{:x}_", u32::from(c)).expect("strings take all"),
        }
    }
    out
}

impl Reader<'_> {
    fn rules(&mut self) -> Result<(), String> {
        self.blank(true);
        let mut defined = false;
        while self.chars.peek().is_some() {
            let name = self.name()?;
            self.blank(true);
            for expected in "::=".chars() {
                self.expect(expected)?;
            }
            defined |= name == "root";
            write!(self.out, "{}: ", lark_name(&name)).expect("strings take all");
            self.alternatives()?;
            self.out.push('\n');
            self.blank(true);
        }
        if defined { Ok(()) } else { Err("no rule is called root".into()) }
    }

    /// Reads `a b | c …` up to the end of the rule or of the group.
    fn alternatives(&mut self) -> Result<(), String> {
        loop {
            self.sequence()?;
            self.blank(self.depth > 0);
            // A rule goes on in the next line when that begins with a bar.
            if self.depth == 0 && self.chars.peek() == Some(&'\n') {
                let mut ahead = self.chars.clone().skip_while(|c| c.is_whitespace());
                if ahead.next() == Some('|') {
                    self.blank(true);
                }
            }
            if self.chars.peek() != Some(&'|') {
                return Ok(());
            }
            self.chars.next();
            self.out.push_str(" | ");
        }
    }

    fn sequence(&mut self) -> Result<(), String> {
        let mut items = 0;
        self.blank(true);
        loop {
            match self.chars.peek() {
                Some('"') => self.literal()?,
                Some('[') => self.class()?,
                Some('.') => {
                    self.chars.next();
                    self.out.push_str("/(?s:.)/");
                }
                Some('(') => self.group()?,
                Some(&c) if is_name(c) => {
                    let name = self.name()?;
                    self.out.push_str(&lark_name(&name));
                }
                Some('|' | ')' | '\n') | None => break,
                Some(other) => return Err(format!("{other:?} is not part of a rule")),
            }
            items += 1;
            self.repetition()?;
            self.out.push(' ');
            self.blank(self.depth > 0);
        }
        if items == 0 {
            self.out.push_str("\"\"");
        }
        Ok(())
    }

    fn group(&mut self) -> Result<(), String> {
        self.chars.next();
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(format!("groups are nested more than {MAX_DEPTH} deep"));
        }
        self.out.push('(');
        self.alternatives()?;
        self.blank(true);
        self.expect(')')?;
        self.out.push(')');
        self.depth -= 1;
        Ok(())
    }

    fn literal(&mut self) -> Result<(), String> {
        self.chars.next();
        let mut text = String::new();
        loop {
            match self.chars.next() {
                None | Some('\n') => return Err("a literal has no end".into()),
                Some('"') => break,
                Some('\\') => text.push(self.escape()?),
                Some(c) => text.push(c),
            }
        }
        self.out.push_str(&quote(&text));
        Ok(())
    }

    /// Reads a class of characters and writes it as a regular expression of one character.
    fn class(&mut self) -> Result<(), String> {
        self.chars.next();
        self.out.push_str("/[");
        if self.chars.next_if_eq(&'^').is_some() {
            self.out.push('^');
        }
        let mut empty = true;
        loop {
            match self.chars.next() {
                None | Some('\n') => return Err("a class of characters has no end".into()),
                Some(']') => break,
                Some('-') => self.out.push('-'),
                Some('\\') => {
                    let c = self.escape()?;
                    self.class_char(c);
                }
                Some(c) => self.class_char(c),
            }
            empty = false;
        }
        if empty {
            return Err("a class of characters is empty".into());
        }
        self.out.push_str("]/");
        Ok(())
    }

    fn class_char(&mut self, c: char) {
        write!(self.out, "\\x{{{:x}}}", u32::from(c)).expect("strings take all");
    }

    /// Reads what follows a backslash.
    fn escape(&mut self) -> Result<char, String> {
        let c = self.chars.next().ok_or("nothing follows a backslash")?;
        let digits = match c {
            'n' => return Ok('\n'),
            'r' => return Ok('\r'),
            't' => return Ok('\t'),
            'x' => 2,
            'u' => 4,
            'U' => 8,
            c if c.is_ascii_punctuation() => return Ok(c),
            c => return Err(format!("\\{c} is not an escape")),
        };
        let hex: String = (0..digits).filter_map(|_| self.chars.next_if(char::is_ascii_hexdigit)).collect();
        let code = u32::from_str_radix(&hex, 16).ok().filter(|_| hex.len() == digits).and_then(char::from_u32);
        code.ok_or_else(|| format!("\\{c}{hex} is not a character"))
    }

    fn repetition(&mut self) -> Result<(), String> {
        match self.chars.peek() {
            Some('*' | '+' | '?') => self.out.extend(self.chars.next()),
            Some('{') => {
                let mut text = String::new();
                while let Some(c) = self.chars.next_if(|&c| c != '}' && c != '\n') {
                    text.push(c);
                }
                self.expect('}')?;
                let text: String = text[1..].chars().filter(|c| !c.is_whitespace()).collect();
                let (least, most) = text.split_once(',').unwrap_or((&text, &text));
                let number = |text: &str| text.parse::<u32>().is_ok() || text.is_empty();
                if !number(least) || !number(most) || text.is_empty() {
                    return Err(format!("{{{text}}} is not a repetition"));
                }
                write!(self.out, "{{{text}}}").expect("strings take all");
            }
            _ => {}
        }
        Ok(())
    }

    fn name(&mut self) -> Result<String, String> {
        let mut name = String::new();
        while let Some(c) = self.chars.next_if(|&c| is_name(c)) {
            name.push(c);
        }
        if name.is_empty() { Err("the name of a rule is missing".into()) } else { Ok(name) }
    }

    fn expect(&mut self, expected: char) -> Result<(), String> {
        match self.chars.next() {
            Some(c) if c == expected => Ok(()),
            Some(c) => Err(format!("{expected:?} expected, got {c:?}")),
            None => Err(format!("{expected:?} expected at the end")),
        }
    }

    /// Skips blanks and comments; ends of lines only where `lines` says that they mean nothing.
    fn blank(&mut self, lines: bool) {
        while let Some(&c) = self.chars.peek() {
            if c == '#' {
                while self.chars.next_if(|&c| c != '\n').is_some() {}
            } else if c == '\n' && lines {
                self.line += 1;
                self.chars.next();
            } else if c.is_whitespace() && c != '\n' {
                self.chars.next();
            } else {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_become_lark() {
        let check =
            |text: &str, expected: &str| assert_eq!(to_lark(text).as_deref().map(str::trim), Ok(expected), "{text}");
        check(r#"root ::= "a" | "b\n\"" "#, r#"start: "a"  | "b\n\"""#);
        check("root ::= [a-z0-9_]+ # word", r"start: /[\x{61}-\x{7a}\x{30}-\x{39}\x{5f}]/+");
        check("root ::= [^\\]\\x41]{2,5}", r"start: /[^\x{5d}\x{41}]/{2,5}");
        check(
            "root ::= a-b (c | \"x\"?)*\na-b ::= \"y\"\nc::=\n  \"z\"\n  | \"w\"",
            "start: r_a_2d_b (r_c  | \"x\"? )* \nr_a_2d_b: \"y\" \nr_c: \"z\"  | \"w\"",
        );
    }

    #[test]
    fn errors_name_the_line() {
        let check = |text: &str, expected: &str| assert_eq!(to_lark(text).unwrap_err(), expected);
        check("x ::= \"a\"", "line 1: no rule is called root");
        check("root ::= \"a", "line 1: a literal has no end");
        check("root ::= x\n\nx ::= %", "line 3: '%' is not part of a rule");
        check("root ::= []", "line 1: a class of characters is empty");
        check("root ::= \"\\q\"", "line 1: \\q is not an escape");
        check("root ::= a{x}", "line 1: {x} is not a repetition");
        check(&format!("root ::= {}", "(".repeat(100_000)), "line 1: groups are nested more than 64 deep");
    }

    #[test]
    fn ebnf_is_told_from_lark() {
        assert!(is_ebnf("# x\nroot ::= \"a\""));
        assert!(!is_ebnf("start: \"a ::= b\""));
        assert!(!is_ebnf("start: /x/"));
    }
}
