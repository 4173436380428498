//! The tables as a picture: for each, bars of reads per second and of processor time per read.

use std::fmt::Write;

use crate::report::{Row, Sample, Table};
use crate::subjects::Kind;

/// Height of a bar with the space below it, in pixels.
const STEP: f64 = 18.0;
/// Where the first column of bars starts.
const LEFT: f64 = 190.0;
/// Width of the longest bar.
const WIDTH: f64 = 260.0;
/// Where the second column starts, after the first and the figures beside it.
const COLUMN: f64 = 350.0;

/// An SVG picture of all tables.
pub fn svg(tables: &[Table]) -> String {
    let mut body = String::new();
    let mut top = 10.0;
    for table in tables {
        top += 20.0;
        text(
            &mut body,
            10.0,
            top,
            "start",
            &format!("font-weight=\"bold\">{}", table.title()),
        );
        text(&mut body, LEFT, top, "start", ">reads per second");
        text(
            &mut body,
            LEFT + COLUMN,
            top,
            "start",
            ">processor time per read, us",
        );
        bars(&mut body, table, LEFT, top, |sample| sample.rate);
        bars(&mut body, table, LEFT + COLUMN, top, |sample| sample.cpu);
        for (number, row) in (1..).zip(&table.rows) {
            let baseline = top + f64::from(number) * STEP;
            text(
                &mut body,
                LEFT - 8.0,
                baseline,
                "end",
                &format!(">{}", row.name),
            );
        }
        top += table.rows.len() as f64 * STEP + 10.0;
    }
    let width = LEFT + 2.0 * COLUMN;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{top}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{body}</svg>\n"
    )
}

fn bars(body: &mut String, table: &Table, left: f64, top: f64, figure: fn(&Sample) -> f64) {
    let longest = table
        .rows
        .iter()
        .map(|row| row.median(figure))
        .fold(0.0, f64::max);
    for (number, row) in (1..).zip(&table.rows) {
        let value = row.median(figure);
        let length = value / longest * WIDTH;
        let baseline = top + f64::from(number) * STEP;
        let _ = writeln!(
            body,
            "<rect x=\"{left}\" y=\"{:.1}\" width=\"{length:.1}\" height=\"12\" fill=\"{}\"/>",
            baseline - 10.0,
            colour(row),
        );
        let digits = if value < 1000.0 { 2 } else { 0 };
        text(
            body,
            left + length + 4.0,
            baseline,
            "start",
            &format!(">{value:.digits$}"),
        );
    }
}

fn colour(row: &Row) -> &'static str {
    match row.kind {
        Some(Kind::Ours | Kind::Cached) => "#1b6ca8",
        Some(Kind::Peer | Kind::Other) => "#d98032",
        Some(Kind::Null) | None => "#9a9a9a",
    }
}

/// Text whose attributes come before the first `>` of `rest`.
fn text(body: &mut String, x: f64, y: f64, anchor: &str, rest: &str) {
    let _ = writeln!(
        body,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" {rest}</text>"
    );
}
