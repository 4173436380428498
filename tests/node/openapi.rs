//! Reads `docs/openapi.yaml`: the part of YAML that it is written in, strictly.

use serde_json::{Map, Value};

/// Parses the description that a node serves.
///
/// # Panics
/// For YAML that this does not read, so that nothing is left out unseen.
pub fn parse(text: &str) -> Value {
    let lines: Vec<_> = text
        .lines()
        .map(str::trim_end)
        .filter(|line| !line.is_empty())
        .map(|line| {
            let content = line.trim_start();
            (line.len() - content.len(), content.to_owned())
        })
        .collect();
    let mut block = Block { lines, at: 0 };
    let value = block.value(0);
    assert_eq!(
        block.at,
        block.lines.len(),
        "a line is left: {:?}",
        block.lines.get(block.at)
    );
    value
}

/// Lines with their indentation.
struct Block {
    lines: Vec<(usize, String)>,
    at: usize,
}

impl Block {
    /// The line to come, if it is indented by at least `indent`.
    fn peek(&self, indent: usize) -> Option<(usize, &str)> {
        let (found, text) = self.lines.get(self.at)?;
        (*found >= indent).then_some((*found, text))
    }

    /// A list or an object whose lines are indented by at least `indent`.
    fn value(&mut self, indent: usize) -> Value {
        let (indent, first) = self.peek(indent).expect("a value");
        match first.starts_with("- ") {
            true => self.list(indent),
            false => self.object(indent),
        }
    }

    fn list(&mut self, indent: usize) -> Value {
        let mut items = Vec::new();
        while let Some((found, text)) = self.peek(indent) {
            let Some(item) = text.strip_prefix("- ").filter(|_| found == indent) else {
                panic!("expected an item of a list: {text}");
            };
            // The rest of the line is the first line of the item, which is indented further.
            self.lines[self.at] = (indent + 2, item.to_owned());
            items.push(self.value(indent + 2));
        }
        Value::Array(items)
    }

    fn object(&mut self, indent: usize) -> Value {
        let mut fields = Map::new();
        while let Some((found, text)) = self.peek(indent) {
            assert_eq!(found, indent, "indentation of {text}");
            let text = text.to_owned();
            let (key, rest) = key(&text);
            self.at += 1;
            let value = match rest {
                "" => self.value(indent + 1),
                rest => {
                    let (value, rest) = flow(rest);
                    assert_eq!(rest, "", "in {rest}");
                    value
                }
            };
            assert!(fields.insert(key, value).is_none(), "a key occurs twice");
        }
        Value::Object(fields)
    }
}

/// The key at the start of a line, and what follows it.
fn key(text: &str) -> (String, &str) {
    let (key, rest) = match text.strip_prefix('"') {
        Some(quoted) => quoted
            .split_once("\":")
            .unwrap_or_else(|| panic!("a key: {text}")),
        None => text
            .split_once(':')
            .unwrap_or_else(|| panic!("a key: {text}")),
    };
    (key.to_owned(), rest.trim_start())
}

/// A value on one line, and what follows it.
fn flow(text: &str) -> (Value, &str) {
    let text = text.trim_start();
    match text.as_bytes()[0] {
        b'{' => flow_object(&text[1..]),
        b'[' => flow_list(&text[1..]),
        quote @ (b'"' | b'\'') => {
            let end = text[1..]
                .find(char::from(quote))
                .expect("the end of a text")
                + 1;
            (Value::from(&text[1..end]), text[end + 1..].trim_start())
        }
        _ => (plain(text), ""),
    }
}

fn flow_object(mut rest: &str) -> (Value, &str) {
    let mut fields = Map::new();
    loop {
        let (key, value) = key(rest.trim_start());
        let (value, after) = nested(value);
        fields.insert(key, value);
        match after.split_at(1) {
            (",", after) => rest = after,
            ("}", after) => return (Value::Object(fields), after.trim_start()),
            _ => panic!("expected , or }}: {after}"),
        }
    }
}

fn flow_list(mut rest: &str) -> (Value, &str) {
    let mut items = Vec::new();
    loop {
        let (value, after) = nested(rest);
        items.push(value);
        match after.split_at(1) {
            (",", after) => rest = after,
            ("]", after) => return (Value::Array(items), after.trim_start()),
            _ => panic!("expected , or ]: {after}"),
        }
    }
}

/// A value inside of braces or brackets: plain text ends where they do, or at a comma.
fn nested(text: &str) -> (Value, &str) {
    let text = text.trim_start();
    match text.as_bytes()[0] {
        b'{' | b'[' | b'"' | b'\'' => flow(text),
        _ => {
            let end = text.find([',', '}', ']']).expect("the end of a value");
            (plain(text[..end].trim_end()), &text[end..])
        }
    }
}

fn plain(text: &str) -> Value {
    match text {
        "true" => Value::from(true),
        "false" => Value::from(false),
        _ => text
            .parse::<i64>()
            .map_or_else(|_| Value::from(text), Value::from),
    }
}

/// Follows `$ref` of a schema, parameter or answer.
pub fn resolved<'d>(description: &'d Value, mut value: &'d Value) -> &'d Value {
    while let Some(reference) = value["$ref"].as_str() {
        let pointer = reference
            .strip_prefix('#')
            .expect("a reference into the file");
        value = description
            .pointer(pointer)
            .unwrap_or_else(|| panic!("{reference}"));
    }
    value
}

/// Why a value does not fit a schema; `None` if it does.
pub fn misfit(description: &Value, schema: &Value, value: &Value) -> Option<String> {
    let schema = resolved(description, schema);
    if value.is_null() && schema["nullable"] == true {
        return None;
    }
    let wrong = || Some(format!("{value} is not {schema}"));
    if let Some(words) = schema["enum"].as_array()
        && !words.contains(value)
    {
        return wrong();
    }
    match schema["type"].as_str() {
        Some("object") => object_misfit(description, schema, value),
        Some("array") => {
            let items = value.as_array();
            let items = items.map(|items| items.iter());
            items.map_or_else(wrong, |mut items| {
                items.find_map(|item| misfit(description, &schema["items"], item))
            })
        }
        Some("string") if value.is_string() => None,
        Some("boolean") if value.is_boolean() => None,
        Some("integer") if value.is_u64() || value.is_i64() => None,
        Some("number") if value.is_number() => None,
        None => None,
        Some(_) => wrong(),
    }
}

fn object_misfit(description: &Value, schema: &Value, value: &Value) -> Option<String> {
    let Some(fields) = value.as_object() else {
        return Some(format!("{value} is not an object"));
    };
    let required = schema["required"].as_array().into_iter().flatten();
    for name in required.filter_map(Value::as_str) {
        if !fields.contains_key(name) {
            return Some(format!("{name} is missing in {value}"));
        }
    }
    let properties = schema["properties"].as_object();
    fields.iter().find_map(|(name, value)| {
        let known = properties.and_then(|properties| properties.get(name));
        let more = &schema["additionalProperties"];
        match (known, more) {
            (Some(known), _) => misfit(description, known, value),
            (None, Value::Object(_)) => misfit(description, more, value),
            // Without properties, an object may have any.
            (None, _) if properties.is_none() => None,
            (None, _) => Some(format!("{name} is not described")),
        }
    })
}
