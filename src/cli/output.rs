//! What people and programs read: results on standard output, everything else on standard error.
//!
//! Invariant: a name or text from elsewhere reaches a terminal only through [`escape`]; JSON carries it as it is.

use std::io::{self, IsTerminal, Write};

use anyhow::Result;
use serde::Serialize;

use super::ending::Ended;
use crate::safe_path::escape;

/// Ends a process whose reader has gone, as the signal of that name would.
const SIGPIPE: u8 = 128 + 13;

/// Writes one line to standard output.
///
/// # Errors
/// [`Ended`] if nobody reads it any more.
pub fn line(text: &str) -> Result<()> {
    print(format!("{text}\n").as_bytes())
}

/// Writes one JSON object on its line.
///
/// # Errors
/// [`Ended`] if nobody reads it any more.
pub fn json(value: &impl Serialize) -> Result<()> {
    line(&serde_json::to_string(value)?)
}

/// Writes bytes to standard output.
pub(super) fn print(bytes: &[u8]) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Ended {
            code: SIGPIPE,
            message: String::new(),
        }
        .into()),
        other => Ok(other?),
    }
}

/// Writes one line to standard error.
pub fn note(text: &str) {
    // Nobody can be told that standard error is closed.
    let _ = writeln!(io::stderr().lock(), "{}", escape(text));
}

/// Shows the cursor that a prompt may have hidden.
pub fn show_cursor() {
    if io::stderr().is_terminal() {
        let _ = io::stderr().lock().write_all(b"\x1b[?25h");
    }
}

/// Columns with a heading, all right-aligned but those that begin with `<`, the last one as long as it is.
pub(super) fn table(headings: &[&str], rows: &[Vec<String>]) -> Vec<String> {
    let width = |i: usize, heading: &str| {
        let cells = rows.iter().map(|row| row[i].chars().count());
        cells
            .chain([heading.trim_start_matches('<').len()])
            .max()
            .unwrap_or_default()
    };
    let widths: Vec<usize> = headings
        .iter()
        .enumerate()
        .map(|(i, heading)| width(i, heading))
        .collect();
    let format = |cells: &mut dyn Iterator<Item = &str>| {
        let cells = cells.zip(headings.iter().zip(&widths)).enumerate().map(
            |(i, (cell, (heading, width)))| match heading.starts_with('<') {
                true if i + 1 == headings.len() => cell.to_owned(),
                true => format!("{cell:<width$}"),
                false => format!("{cell:>width$}"),
            },
        );
        cells.collect::<Vec<_>>().join("  ")
    };
    let first = format(
        &mut headings
            .iter()
            .map(|heading| heading.trim_start_matches('<')),
    );
    [first]
        .into_iter()
        .chain(
            rows.iter()
                .map(|row| format(&mut row.iter().map(String::as_str))),
        )
        .collect()
}

/// `1 file`, `2 files`.
pub(super) fn count(n: u64, thing: &str) -> String {
    format!("{n} {thing}{}", if n == 1 { "" } else { "s" })
}

/// A span of time in its two largest units: `6 d 3 h`, `12 s`.
pub(super) fn span(seconds: u64) -> String {
    let units = [("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)];
    let first = units
        .iter()
        .position(|(_, length)| seconds >= *length)
        .unwrap_or(units.len() - 1);
    let mut rest = seconds;
    let parts = units[first..].iter().take(2).map(|(unit, length)| {
        let n = rest / length;
        rest %= length;
        (n, unit)
    });
    let parts: Vec<_> = parts
        .enumerate()
        .filter(|(i, (n, _))| *i == 0 || *n > 0)
        .collect();
    parts
        .iter()
        .map(|(_, (n, unit))| format!("{n} {unit}"))
        .collect::<Vec<_>>()
        .join(" ")
}

/// Words as a shell would have to be given them, without control characters.
#[must_use]
pub fn shell(words: &[String]) -> String {
    let plain = |word: &str| {
        !word.is_empty()
            && word
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_./:=@%+,".contains(&byte))
    };
    let quote = |word: &String| {
        if plain(word) {
            word.clone()
        } else {
            format!("'{}'", word.replace('\'', r"'\''"))
        }
    };
    escape(&words.iter().map(quote).collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [
            vec!["1.0 GiB".into(), "ab".into(), "x/y".into()],
            vec!["7 B".into(), "abcd".into(), "z".into()],
        ];
        let lines = table(&["SIZE", "<ID", "<NAME"], &rows);
        assert_eq!(
            lines,
            [
                "   SIZE  ID    NAME",
                "1.0 GiB  ab    x/y",
                "    7 B  abcd  z"
            ]
        );
        assert_eq!(table(&["SIZE"], &[]), ["SIZE"]);
    }

    #[test]
    fn spans_and_counts_read_well() {
        for (seconds, text) in [
            (0, "0 s"),
            (59, "59 s"),
            (60, "1 min"),
            (61, "1 min 1 s"),
            (3_600, "1 h"),
            (536_400, "6 d 5 h"),
        ] {
            assert_eq!(span(seconds), text);
        }
        assert_eq!(
            (count(1, "file"), count(0, "file")),
            ("1 file".into(), "0 files".into())
        );
    }

    #[test]
    fn shells_get_back_the_same_words() {
        let words = ["get", "a b/it's [x].mkv", "-o", "OUT/"].map(String::from);
        assert_eq!(shell(&words), r"get 'a b/it'\''s [x].mkv' -o OUT/");
        assert_eq!(shell(&["".into(), "\u{1b}[2J".into()]), r"'' '\u{1b}[2J'");
    }
}
