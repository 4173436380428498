//! Samples of Prometheus text.

use std::collections::BTreeMap;

/// One sample: `name{label="value",...} number`.
#[derive(Debug, PartialEq)]
pub(super) struct Sample<'a> {
    pub(super) name: &'a str,
    pub(super) labels: BTreeMap<&'a str, String>,
    pub(super) value: f64,
}

/// Returns the samples of a text. Comments and malformed lines are left out.
pub(super) fn samples(text: &str) -> impl Iterator<Item = Sample<'_>> {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(sample)
}

fn sample(line: &str) -> Option<Sample<'_>> {
    let end = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = BTreeMap::new();
    if let Some(inner) = rest.strip_prefix('{') {
        rest = inner;
        loop {
            if let Some(after) = rest.strip_prefix('}') {
                rest = after;
                break;
            }
            let (label, quoted) = rest.split_once("=\"")?;
            let (value, after) = unquote(quoted)?;
            labels.insert(label, value);
            rest = after.strip_prefix(',').unwrap_or(after);
        }
    }
    let value = rest.split_ascii_whitespace().next()?.parse().ok()?;
    Some(Sample {
        name,
        labels,
        value,
    })
}

/// The text before the closing quotation mark, without escapes, and what follows the mark.
fn unquote(quoted: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut letters = quoted.char_indices();
    while let Some((at, letter)) = letters.next() {
        match letter {
            '"' => return Some((value, quoted.get(at + 1..)?)),
            '\\' => match letters.next()?.1 {
                'n' => value.push('\n'),
                other => value.push(other),
            },
            other => value.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_with_escapes_are_read_and_damage_is_left_out() {
        let text = "# TYPE a counter\na_total{disk=\"x\\\"\\\\\\n}\",op=\"read\"} 7.5 123\nplain 1\n\
                    a{disk=\"x\nb{}\nc{d=\"e\"} word\n";
        let found: Vec<_> = samples(text).collect();
        assert_eq!(found.len(), 2, "{found:?}");
        assert_eq!((found[0].name, found[0].value), ("a_total", 7.5));
        assert_eq!(found[0].labels["disk"], "x\"\\\n}");
        assert_eq!(found[0].labels["op"], "read");
        assert_eq!((found[1].name, found[1].value), ("plain", 1.0));
    }
}
