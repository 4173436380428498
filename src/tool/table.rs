//! Tables for people: aligned columns, numbers to the right.

use std::fmt;

use indicatif::{BinaryBytes, HumanCount};

/// Alignment of a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// A table with a heading.
#[derive(Debug)]
pub(super) struct Table<const N: usize> {
    columns: [(&'static str, Align); N],
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    /// An empty table with these headings.
    pub(super) fn new(columns: [(&'static str, Align); N]) -> Self {
        Self {
            columns,
            rows: Vec::new(),
        }
    }

    /// Adds a row. Control characters, which could change the terminal, are escaped.
    pub(super) fn add(&mut self, row: [String; N]) {
        self.rows.push(row.map(|cell| printable(&cell)));
    }
}

impl<const N: usize> fmt::Display for Table<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let heading = self.columns.map(|(name, _)| name.to_owned());
        let rows = || std::iter::once(&heading).chain(&self.rows);
        let widths: [usize; N] = std::array::from_fn(|column| {
            let cells = rows().map(|row| row[column].chars().count());
            cells.max().unwrap_or(0)
        });
        for row in rows() {
            let mut line = String::new();
            for ((cell, width), (_, align)) in row.iter().zip(widths).zip(self.columns) {
                line += &match align {
                    Align::Left => format!("{cell:width$}  "),
                    Align::Right => format!("{cell:>width$}  "),
                };
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// Escapes control characters.
pub(super) fn printable(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter.is_control() {
            true => safe.extend(letter.escape_default()),
            false => safe.push(letter),
        }
    }
    safe
}

/// A number of bytes in binary units.
pub(super) fn size(bytes: u64) -> String {
    BinaryBytes(bytes).to_string()
}

/// A number of things, with separators.
pub(super) fn count(number: u64) -> String {
    HumanCount(number).to_string()
}

/// A ratio of two sizes.
pub(super) fn ratio(ratio: f64) -> String {
    format!("{ratio:.2}")
}

/// A part of a whole in percent.
pub(super) fn percent(percent: f64) -> String {
    format!("{percent:.1} %")
}

/// A duration in seconds.
pub(super) fn seconds(seconds: f64) -> String {
    format!("{seconds:.2} s")
}

/// A time span in its largest two units.
pub(super) fn span(seconds: u64) -> String {
    let units = [(86_400, "d"), (3_600, "h"), (60, "m")];
    match units.into_iter().find(|(unit, _)| seconds >= *unit) {
        None => format!("{seconds}s"),
        Some((unit, name)) => {
            let (next, next_name) = match unit {
                86_400 => (3_600, "h"),
                3_600 => (60, "m"),
                _ => (1, "s"),
            };
            format!(
                "{}{name}{}{next_name}",
                seconds / unit,
                seconds % unit / next
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stand_to_the_right_and_control_characters_are_escaped() {
        let mut table = Table::new([("NAME", Align::Left), ("SIZE", Align::Right)]);
        table.add(["a\u{1b}[2J".to_owned(), size(1536)]);
        table.add(["longer than the other".to_owned(), size(7)]);
        let expected = "NAME                       SIZE\n\
                        a\\u{1b}[2J             1.50 KiB\n\
                        longer than the other       7 B\n";
        assert_eq!(table.to_string(), expected);
    }

    #[test]
    fn a_span_has_two_units() {
        let expected = [
            (0, "0s"),
            (59, "59s"),
            (61, "1m1s"),
            (7_260, "2h1m"),
            (180_000, "2d2h"),
        ];
        for (seconds, text) in expected {
            assert_eq!(span(seconds), text);
        }
    }
}
