//! Azure's LLM inference traces of 2023: rows of a time and two lengths (github.com/Azure/AzurePublicDataset).

use super::{Error, Request, Trace, length};
use std::time::Duration;

const COLUMNS: [&str; 3] = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"];

pub(super) fn read(file: &str, text: &str) -> Result<Vec<Request>, Error> {
    let wrong = |index: usize, problem| Error::Line { file: file.to_owned(), line: index + 1, problem };
    let mut lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    match lines.next() {
        Some((_, line)) if line.split(',').map(str::trim).eq(COLUMNS) => {}
        Some((index, line)) => {
            return Err(wrong(index, format!("the columns are {line:?}, they must be {:?}", COLUMNS.join(","))));
        }
        None => return Ok(Vec::new()),
    }
    let mut rows = Vec::new();
    let mut next_block = 0;
    for (index, line) in lines {
        rows.push(row(line, &mut next_block).map_err(|problem| wrong(index, problem))?);
    }
    let start = rows.iter().map(|(at, _)| *at).min().unwrap_or(Duration::ZERO);
    Ok(rows.into_iter().map(|(at, request)| Request { at: at - start, ..request }).collect())
}

/// Reads a row as a time since a start far back and a request whose blocks are nobody else's.
fn row(line: &str, next_block: &mut u64) -> Result<(Duration, Request), String> {
    let fields: Vec<&str> = line.split(',').map(str::trim).collect();
    let &[time, input, output] = fields.as_slice() else {
        return Err(format!(
            "a row has {} fields, it must have {}: {}",
            fields.len(),
            COLUMNS.len(),
            COLUMNS.join(",")
        ));
    };
    let tokens = |column: usize, text: &str| {
        let tokens = text.parse().map_err(|_| format!("{} is {text:?}, it must be a number", COLUMNS[column]))?;
        length(COLUMNS[column], tokens)
    };
    let at =
        timestamp(time).ok_or_else(|| format!("TIMESTAMP is {time:?}, it must be like 2023-11-16 18:15:46.6805900"))?;
    let (input_tokens, output_tokens) = (tokens(1, input)?, tokens(2, output)?);
    let blocks = *next_block..*next_block + input_tokens.div_ceil(Trace::BLOCK_TOKENS) as u64;
    *next_block = blocks.end;
    Ok((at, Request { at: Duration::ZERO, input_tokens, output_tokens, blocks: blocks.collect() }))
}

/// Reads `2023-11-16 18:15:46.6805900` as a time since a start far back.
fn timestamp(text: &str) -> Option<Duration> {
    let (date, time) = text.split_once(' ')?;
    let mut date = date.splitn(3, '-').map(|part| part.parse::<u64>().ok());
    let (year, month, day) = (date.next()??, date.next()??, date.next()??);
    let (clock, fraction) = time.split_once('.').unwrap_or((time, "0"));
    let mut clock = clock.splitn(3, ':').map(|part| part.parse::<u64>().ok());
    let (hour, minute, second) = (clock.next()??, clock.next()??, clock.next()??);
    let fits = year <= 9999 && (1..=12).contains(&month) && (1..=31).contains(&day);
    if !fits || hour > 23 || minute > 59 || second > 60 || !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let nanos: u64 = format!("{:0<9.9}", fraction).parse().ok()?;
    let seconds = ((days(year, month, day) * 24 + hour) * 60 + minute) * 60 + second;
    Some(Duration::from_secs(seconds) + Duration::from_nanos(nanos))
}

/// Counts days from a start far back, in years that begin in March, so that a leap day is the last of its year (Hinnant,
/// "chrono-compatible low-level date algorithms", `days_from_civil`).
fn days(year: u64, month: u64, day: u64) -> u64 {
    let (year, month) = if month > 2 { (year + 400, month - 3) } else { (year + 399, month + 9) };
    year * 365 + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_follow_the_calendar() {
        let apart = |from: &str, to: &str| timestamp(to).unwrap() - timestamp(from).unwrap();
        let day = Duration::from_secs(86_400);
        assert_eq!(apart("2023-11-16 00:00:00", "2023-11-17 00:00:00"), day);
        assert_eq!(apart("2023-12-31 23:59:59.5", "2024-01-01 00:00:00.25"), Duration::from_millis(750));
        assert_eq!(apart("2023-02-28 00:00:00", "2023-03-01 00:00:00"), day);
        assert_eq!(apart("2024-02-28 00:00:00", "2024-03-01 00:00:00"), 2 * day);
        assert_eq!(apart("1970-01-01 00:00:00", "2023-11-16 00:00:00"), 19_677 * day);
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for text in ["", "2023-11-16", "2023-13-16 00:00:00", "2023-11-16 24:00:00", "2023-11-16 00:00:00.x", "a b"] {
            assert_eq!(timestamp(text), None, "{text:?}");
        }
    }
}
