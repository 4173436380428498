//! The tables as a picture: for each, bars of reads per second and of processor time per read.

use crate::bars::{self, Group};
use crate::report::Table;
use crate::subjects::Kind;

/// An SVG picture of all tables.
pub fn svg(tables: &[Table]) -> String {
    let groups: Vec<_> = tables.iter().map(group).collect();
    bars::svg(&groups)
}

fn group(table: &Table) -> Group {
    let rows = table.rows.iter().map(|row| bars::Row {
        name: row.name.clone(),
        colour: colour(row.kind),
        values: vec![
            row.median(|sample| sample.rate),
            row.median(|sample| sample.cpu),
        ],
    });
    let columns = ["reads per second", "processor time per read, us"];
    Group::with_columns(table.title(), &columns, rows.collect())
}

fn colour(kind: Option<Kind>) -> &'static str {
    match kind {
        Some(Kind::Ours | Kind::Cached) => bars::OURS,
        Some(Kind::Peer | Kind::Other) => "#d98032",
        Some(Kind::Null) | None => "#9a9a9a",
    }
}
