//! Results as a picture: groups of bars, one below the other.

use std::fmt::Write;

/// Height of a bar with the space below it, in pixels.
const STEP: f64 = 18.0;
/// Where the first column of bars starts.
const LEFT: f64 = 190.0;
/// Width of the longest bar of a single column, and of one of several.
const WIDTHS: [f64; 2] = [420.0, 260.0];
/// Space beside the longest bar, for its figure.
const FIGURE: f64 = 90.0;

/// Colour of the bars of this program.
pub const OURS: &str = "#1b6ca8";

/// Bars with a title: a name for each row, and one or more columns of figures.
pub struct Group {
    title: String,
    /// What each column shows; empty: the title says it.
    columns: Vec<&'static str>,
    rows: Vec<Row>,
}

/// A row of bars.
pub struct Row {
    /// Its name.
    pub name: String,
    /// Colour of its bars.
    pub colour: &'static str,
    /// A figure for each column.
    pub values: Vec<f64>,
}

impl Group {
    /// Bars in several columns.
    #[allow(dead_code)] // Not every benchmark has them.
    pub fn with_columns(title: String, columns: &[&'static str], rows: Vec<Row>) -> Self {
        let columns = columns.to_vec();
        Self {
            title,
            columns,
            rows,
        }
    }

    /// Bars of these figures, each with its name.
    #[allow(dead_code)] // Not every benchmark has them.
    pub fn new(title: &str, bars: Vec<(String, f64)>) -> Self {
        let row = |(name, value)| Row {
            name,
            colour: OURS,
            values: vec![value],
        };
        let rows = bars.into_iter().map(row).collect();
        Self::with_columns(title.to_owned(), &[""], rows)
    }

    fn width(&self) -> f64 {
        WIDTHS[usize::from(self.columns.len() > 1)]
    }

    /// Draws the group below `top`; returns where it ends.
    fn draw(&self, body: &mut String, top: f64) -> f64 {
        let top = top + 20.0;
        text(
            body,
            (10.0, top),
            "start",
            " font-weight=\"bold\"",
            &self.title,
        );
        for (number, heading) in self.columns.iter().enumerate() {
            let left = LEFT + number as f64 * (self.width() + FIGURE);
            text(body, (left, top), "start", "", heading);
            self.draw_column(body, number, left, top);
        }
        for (number, row) in (1..).zip(&self.rows) {
            let baseline = top + f64::from(number) * STEP;
            text(body, (LEFT - 8.0, baseline), "end", "", &row.name);
        }
        top + self.rows.len() as f64 * STEP + 10.0
    }

    fn draw_column(&self, body: &mut String, column: usize, left: f64, top: f64) {
        let value = |row: &Row| row.values.get(column).copied().unwrap_or(0.0);
        let longest = self.rows.iter().map(value).fold(0.0, f64::max);
        for (number, row) in (1..).zip(&self.rows) {
            let value = value(row);
            let length = value / longest * self.width();
            let baseline = top + f64::from(number) * STEP;
            let _ = writeln!(
                body,
                "<rect x=\"{left}\" y=\"{:.1}\" width=\"{length:.1}\" height=\"12\" fill=\"{}\"/>",
                baseline - 10.0,
                row.colour,
            );
            let digits = match value {
                1000.0.. => 0,
                10.0.. => 1,
                _ => 2,
            };
            let figure = format!("{value:.digits$}");
            text(body, (left + length + 4.0, baseline), "start", "", &figure);
        }
    }
}

/// An SVG picture of all groups.
pub fn svg<'g>(groups: impl IntoIterator<Item = &'g Group>) -> String {
    let mut body = String::new();
    let (mut top, mut width) = (10.0, 0.0_f64);
    for group in groups {
        top = group.draw(&mut body, top);
        width = width.max(LEFT + group.columns.len() as f64 * (group.width() + FIGURE));
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{top}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{body}</svg>\n"
    )
}

/// Text with more attributes.
fn text(body: &mut String, (x, y): (f64, f64), anchor: &str, more: &str, text: &str) {
    let _ = writeln!(
        body,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\"{more}>{text}</text>"
    );
}
