//! Conditions of a request: `If-Match` and `If-None-Match` (RFC 9110, section 13).
//!
//! The entity tag of a disk is its generation, which changes with its specification. State and figures of the disk are
//! not part of it, so that conditions are for changes; a `GET` has none.

use hyper::header::{HeaderMap, HeaderName, IF_MATCH, IF_NONE_MATCH};

use super::error::{Code, Failure};

/// What must hold of a disk before a request changes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Condition {
    /// One of these.
    matches: Option<Tags>,
    /// None of these.
    none_matches: Option<Tags>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Tags {
    Any,
    Generations(Vec<u64>),
}

impl Condition {
    /// Reads the condition from the headers of a request.
    ///
    /// # Errors
    /// [`Code::BadRequest`] if a header is no list of tags.
    pub fn of(headers: &HeaderMap) -> Result<Self, Failure> {
        Ok(Self {
            matches: tags(headers, &IF_MATCH)?,
            none_matches: tags(headers, &IF_NONE_MATCH)?,
        })
    }

    /// Checks the condition against the generation of the disk; `None` if there is no such disk.
    ///
    /// # Errors
    /// [`Code::Changed`] if it does not hold.
    pub fn check(&self, generation: Option<u64>) -> Result<(), Failure> {
        let has = |tags: &Tags| match (tags, generation) {
            (_, None) => false,
            (Tags::Any, Some(_)) => true,
            (Tags::Generations(known), Some(generation)) => known.contains(&generation),
        };
        let found = || match generation {
            Some(generation) => format!("the disk has the generation {generation}"),
            None => "there is no such disk".to_owned(),
        };
        if self.matches.as_ref().is_some_and(|tags| !has(tags)) {
            let text = format!("If-Match does not hold: {}", found());
            return Err(Failure::new(Code::Changed, text));
        }
        if self.none_matches.as_ref().is_some_and(has) {
            let text = format!("If-None-Match does not hold: {}", found());
            return Err(Failure::new(Code::Changed, text));
        }
        Ok(())
    }
}

/// The tags in all headers of a name. A tag that is no number is that of no disk.
fn tags(headers: &HeaderMap, name: &HeaderName) -> Result<Option<Tags>, Failure> {
    let mut found = None;
    for value in headers.get_all(name) {
        let known = match found.get_or_insert_with(|| Tags::Generations(Vec::new())) {
            Tags::Any => continue,
            Tags::Generations(known) => known,
        };
        let text = value.to_str().map(str::trim).unwrap_or_default();
        if text == "*" {
            found = Some(Tags::Any);
            continue;
        }
        for tag in text.split(',').map(str::trim) {
            let tag = tag.strip_prefix("W/").unwrap_or(tag);
            let inner = tag.strip_prefix('"').and_then(|tag| tag.strip_suffix('"'));
            let inner = inner.ok_or_else(|| {
                let text = format!("{name}: expected * or tags in quotation marks, as \"1\"");
                Failure::new(Code::BadRequest, text)
            })?;
            known.extend(inner.parse::<u64>());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::*;

    fn condition(name: HeaderName, value: &'static str) -> Result<Condition, Failure> {
        let mut headers = HeaderMap::new();
        headers.insert(name, HeaderValue::from_static(value));
        Condition::of(&headers)
    }

    #[test]
    fn conditions_hold_or_not() {
        let holds = |name: HeaderName, value, generation| {
            condition(name, value).unwrap().check(generation).is_ok()
        };
        for (value, generation, matches) in [
            ("*", Some(7), true),
            ("*", None, false),
            ("\"7\"", Some(7), true),
            ("\"1\", W/\"7\"", Some(7), true),
            ("\"8\"", Some(7), false),
            ("\"other\"", Some(7), false),
            ("\"7\"", None, false),
        ] {
            assert_eq!(holds(IF_MATCH, value, generation), matches, "{value}");
            assert_eq!(holds(IF_NONE_MATCH, value, generation), !matches, "{value}");
        }
        Condition::default().check(None).unwrap();
        for value in ["7", "", "\"7", "\"7\",", "W/7"] {
            let refused = condition(IF_MATCH, value).unwrap_err();
            assert_eq!(refused.code, Code::BadRequest, "{value:?}");
        }
    }
}
