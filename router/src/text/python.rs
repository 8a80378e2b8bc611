//! What chat templates expect of the Python below them: `json.dumps` and `strftime`.

use serde_json::{Map, Number, Value as Json};
use std::{
    fmt::Write,
    time::{SystemTime, UNIX_EPOCH},
};

/// How `json.dumps` is asked to print.
#[derive(Debug, Default)]
pub(crate) struct JsonStyle {
    /// Escapes everything outside ASCII.
    pub(crate) ensure_ascii: bool,
    /// Spaces per level; `None` prints one line.
    pub(crate) indent: Option<usize>,
    /// Between items, and between key and value.
    pub(crate) separators: Option<(String, String)>,
    /// Orders objects by key.
    pub(crate) sort_keys: bool,
}

impl JsonStyle {
    /// Prints `value` as Python does.
    pub(crate) fn dumps(&self, value: &Json) -> String {
        let mut out = String::new();
        self.value(value, 0, &mut out);
        out
    }

    fn value(&self, value: &Json, level: usize, out: &mut String) {
        match value {
            Json::Null => out.push_str("null"),
            Json::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
            Json::Number(n) => number(n, out),
            Json::String(s) => self.string(s, out),
            Json::Array(items) => {
                self.list('[', ']', items.iter(), level, out, |this, item, out| this.value(item, level + 1, out))
            }
            Json::Object(map) => self.object(map, level, out),
        }
    }

    fn object(&self, map: &Map<String, Json>, level: usize, out: &mut String) {
        let mut entries: Vec<_> = map.iter().collect();
        if self.sort_keys {
            entries.sort_by_key(|(key, _)| *key);
        }
        let colon = self.separators.as_ref().map_or(": ", |(_, colon)| colon);
        self.list('{', '}', entries.into_iter(), level, out, |this, (key, value), out| {
            this.string(key, out);
            out.push_str(colon);
            this.value(value, level + 1, out);
        });
    }

    fn list<T>(
        &self,
        open: char,
        close: char,
        items: impl ExactSizeIterator<Item = T>,
        level: usize,
        out: &mut String,
        print: impl Fn(&Self, T, &mut String),
    ) {
        out.push(open);
        let empty = items.len() == 0;
        for (i, item) in items.enumerate() {
            if i > 0 {
                out.push_str(self.comma());
            }
            self.newline(level + 1, out);
            print(self, item, out);
        }
        if !empty {
            self.newline(level, out);
        }
        out.push(close);
    }

    /// Python drops the space after a comma when it indents.
    fn comma(&self) -> &str {
        match (&self.separators, self.indent) {
            (Some((comma, _)), _) => comma,
            (None, Some(_)) => ",",
            (None, None) => ", ",
        }
    }

    fn newline(&self, level: usize, out: &mut String) {
        if let Some(indent) = self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * level));
        }
    }

    fn string(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !c.is_ascii()) || (self.ensure_ascii && c == '\u{7f}') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// Integers as they are, floats as `repr` prints them: shortest digits, exponent from 1e16 up and below 1e-4.
fn number(number: &Number, out: &mut String) {
    let Some(float) = number.as_f64().filter(|_| number.is_f64()) else {
        let _ = write!(out, "{number}");
        return;
    };
    let magnitude = float.abs();
    if magnitude != 0.0 && !(1e-4..1e16).contains(&magnitude) {
        let text = format!("{float:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |e| ('-', e));
        let _ = write!(out, "{digits}e{sign}{exponent:0>2}");
    } else {
        let _ = write!(out, "{float:?}");
    }
}

/// Seconds since the Unix epoch.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// Formats a time in UTC; the codes are `strftime`'s. An unknown code stays as it is.
pub(crate) fn strftime(format: &str, seconds: u64) -> String {
    let (days, clock) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil_from_days(days);
    let (hour, minute, second) = (clock / 3_600, clock / 60 % 60, clock % 60);
    let month_name = MONTHS[month as usize - 1];
    let weekday = DAYS[(days % 7) as usize];
    let hour12 = (hour + 11) % 12 + 1;

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let _ = match chars.next() {
            Some('Y') => write!(out, "{year}"),
            Some('y') => write!(out, "{:02}", year % 100),
            Some('m') => write!(out, "{month:02}"),
            Some('d') => write!(out, "{day:02}"),
            Some('e') => write!(out, "{day:2}"),
            Some('B') => write!(out, "{month_name}"),
            Some('b' | 'h') => write!(out, "{}", &month_name[..3]),
            Some('A') => write!(out, "{weekday}"),
            Some('a') => write!(out, "{}", &weekday[..3]),
            Some('H') => write!(out, "{hour:02}"),
            Some('I') => write!(out, "{hour12:02}"),
            Some('M') => write!(out, "{minute:02}"),
            Some('S') => write!(out, "{second:02}"),
            Some('p') => write!(out, "{}", if hour < 12 { "AM" } else { "PM" }),
            Some('j') => write!(out, "{:03}", days - days_from_civil(year, 1, 1) + 1),
            Some('F') => write!(out, "{year}-{month:02}-{day:02}"),
            Some('T') => write!(out, "{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => write!(out, "UTC"),
            Some('z') => write!(out, "+0000"),
            Some('%') => write!(out, "%"),
            Some(other) => write!(out, "%{other}"),
            None => write!(out, "%"),
        };
    }
    out
}

/// Year, month (1..=12) and day (1..=31) of a day counted from 1970-01-01 (Howard Hinnant, "chrono-Compatible Low-Level Date
/// Algorithms", `civil_from_days`).
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

/// The inverse of [`civil_from_days`].
fn days_from_civil(year: u64, month: u64, day: u64) -> u64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, year_of_era) = (year / 400, year % 400);
    let day_of_year = (153 * (if month > 2 { month - 3 } else { month + 9 }) + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(value: Json, expected: &str) {
        assert_eq!(JsonStyle::default().dumps(&value), expected);
    }

    #[test]
    fn prints_like_json_dumps() {
        check(json!({"a": [1, 2.5, -0.0], "b": {}, "c": []}), r#"{"a": [1, 2.5, -0.0], "b": {}, "c": []}"#);
        check(json!(1e16), "1e+16");
        check(json!(1.5e-7), "1.5e-07");
        check(json!(0.0001), "0.0001");
        check(json!(123456789012345680.0), "1.2345678901234568e+17");
        check(json!(18446744073709551615u64), "18446744073709551615");
        check(json!("\u{1}\t\"\\/é😀\u{7f}"), "\"\\u0001\\t\\\"\\\\/é😀\u{7f}\"");
        let ascii = JsonStyle { ensure_ascii: true, sort_keys: true, ..JsonStyle::default() };
        assert_eq!(ascii.dumps(&json!({"z": "é😀", "a": 1})), r#"{"a": 1, "z": "\u00e9\ud83d\ude00"}"#);
    }

    #[test]
    fn indents_like_json_dumps() {
        let style = JsonStyle { indent: Some(2), ..JsonStyle::default() };
        assert_eq!(style.dumps(&json!({"a": [1, 2], "b": {}})), "{\n  \"a\": [\n    1,\n    2\n  ],\n  \"b\": {}\n}");
    }

    #[test]
    fn dates_are_right() {
        assert_eq!(strftime("%d %b %Y", 1_721_952_000), "26 Jul 2024");
        assert_eq!(strftime("%A %Y-%m-%d %H:%M:%S day %j", 951_827_696), "Tuesday 2000-02-29 12:34:56 day 060");
        assert_eq!(strftime("%a %I%p %y 100%% %Q", 0), "Thu 12AM 70 100% %Q");
    }

    #[test]
    fn every_day_of_four_centuries_round_trips() {
        for days in 0..146_097 {
            let (year, month, day) = civil_from_days(days);
            assert_eq!(days_from_civil(year, month, day), days);
        }
    }
}
