//! The results as a picture: bars, one chart below the other.

use std::fmt::Write;

/// Height of a bar with the space below it, in pixels.
const STEP: f64 = 18.0;
/// Where bars start.
const LEFT: f64 = 190.0;
/// Width of the longest bar.
const WIDTH: f64 = 420.0;

/// Named figures.
pub struct Chart {
    title: &'static str,
    bars: Vec<(String, f64)>,
}

impl Chart {
    /// A chart of these figures, each with its name.
    pub fn new(title: &'static str, bars: Vec<(String, f64)>) -> Self {
        Self { title, bars }
    }
}

/// An SVG picture of all charts.
pub fn svg(charts: &[&Chart]) -> String {
    let mut body = String::new();
    let mut top = 10.0;
    for chart in charts {
        top += 20.0;
        text(
            &mut body,
            10.0,
            top,
            "start",
            &format!(" font-weight=\"bold\">{}", chart.title),
        );
        let longest = chart
            .bars
            .iter()
            .map(|(_, value)| *value)
            .fold(0.0, f64::max);
        for (name, value) in &chart.bars {
            top += STEP;
            let length = value / longest * WIDTH;
            let _ = writeln!(
                body,
                "<rect x=\"{LEFT}\" y=\"{:.1}\" width=\"{length:.1}\" height=\"12\" fill=\"#1b6ca8\"/>",
                top - 10.0
            );
            text(&mut body, LEFT - 8.0, top, "end", &format!(">{name}"));
            text(
                &mut body,
                LEFT + length + 4.0,
                top,
                "start",
                &format!(">{value:.1}"),
            );
        }
        top += 10.0;
    }
    let width = LEFT + WIDTH + 80.0;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{top}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{body}</svg>\n"
    )
}

/// Text whose last attributes come before the first `>` of `rest`.
fn text(body: &mut String, x: f64, y: f64, anchor: &str, rest: &str) {
    let _ = writeln!(
        body,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\"{rest}</text>"
    );
}
