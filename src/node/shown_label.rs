//! Labels of disks that the metrics show.

use std::str::FromStr;

/// A label of disks, and its name in the metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShownLabel {
    key: String,
    name: String,
}

/// Text that is not the key of a label.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a key of 1 to 64 letters, digits, and . _ - /")]
pub struct InvalidKey;

impl ShownLabel {
    /// Returns the key of the label.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Returns its name in the metrics: `label_` and the key, in which other characters than letters and digits are `_`.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl FromStr for ShownLabel {
    type Err = InvalidKey;

    fn from_str(text: &str) -> Result<Self, InvalidKey> {
        let valid = |char: char| char.is_ascii_alphanumeric() || "._-/".contains(char);
        if text.is_empty() || text.len() > 64 || !text.chars().all(valid) {
            return Err(InvalidKey);
        }
        let name = text.replace(|char: char| !char.is_ascii_alphanumeric(), "_");
        Ok(Self {
            key: text.to_owned(),
            name: format!("label_{name}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_only_characters_of_metrics() {
        let label: ShownLabel = "example.com/team-1".parse().unwrap();
        assert_eq!(label.key(), "example.com/team-1");
        assert_eq!(label.name(), "label_example_com_team_1");
        for text in ["", "a b", "ä", "a\"", &"x".repeat(65)] {
            assert_eq!(text.parse::<ShownLabel>(), Err(InvalidKey), "{text:?}");
        }
    }
}
