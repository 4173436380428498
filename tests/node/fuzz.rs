//! Requests that are generated from `docs/openapi.yaml`: valid ones, and valid ones with something changed. Whatever is
//! sent, the answer is one that the description has, an error has the schema and a code of the list, and no request is
//! an internal error.
//!
//! `OVBD_API_FUZZ=N` sends N requests.

use std::collections::BTreeSet;
use std::env;

use serde_json::{Map, Value, json};

use super::lifecycle::layer;
use super::node::Node;
use super::openapi::{misfit, parse, resolved};

/// Requests of a run.
const REQUESTS: usize = 2000;

/// Methods of HTTP that a route has or has not.
const METHODS: [&str; 7] = ["get", "put", "post", "patch", "delete", "options", "trace"];

/// Values that have broken servers before.
fn hostile() -> Vec<Value> {
    vec![
        Value::Null,
        json!(true),
        json!(0),
        json!(-1),
        json!(1.5),
        json!(u64::MAX),
        json!(1e300),
        json!(""),
        json!("a\u{0}b"),
        json!("../../etc/passwd"),
        json!("/proc/self/fd/0"),
        json!("\u{202e}ä😀"),
        json!("x".repeat(70_000)),
        json!([]),
        json!({}),
        json!([[[[{}]]]]),
        json!({ "": { "$ref": "#" } }),
    ]
}

/// A pseudo-random sequence (xorshift), the same in each run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % sides as u64) as usize
    }

    fn one_of<'v, T>(&mut self, values: &'v [T]) -> &'v T {
        &values[self.roll(values.len())]
    }
}

/// Makes requests for one node.
struct Maker<'d> {
    description: &'d Value,
    dice: Dice,
    /// A layer that there is.
    layer: String,
    /// Directory below which requests may name files.
    images: String,
}

/// A request, and whether something of it was changed.
struct Request {
    method: String,
    pattern: String,
    target: String,
    body: String,
}

impl Maker<'_> {
    /// A value that fits a schema. Names of fields decide about paths and names.
    fn value(&mut self, name: &str, schema: &Value) -> Value {
        let schema = resolved(self.description, schema);
        if let Some(words) = schema["enum"].as_array() {
            return self.dice.one_of(words).clone();
        }
        match schema["type"].as_str() {
            Some("object") => self.object(schema),
            Some("array") => json!([self.value(name, &schema["items"])]),
            // The size of the disk, a larger and a smaller one.
            Some("integer") if name == "bytes" => json!(*self.dice.one_of(&[1 << 20, 2 << 20, 5])),
            Some("integer") => {
                let low = schema["minimum"].as_i64().unwrap_or(0);
                let high = schema["maximum"].as_i64().unwrap_or(low + 1000);
                json!(*self.dice.one_of(&[low, (low + high) / 2, high, low + 1]))
            }
            Some("boolean") => json!(self.dice.roll(2) == 0),
            _ => self.text(name),
        }
    }

    fn text(&mut self, name: &str) -> Value {
        match name {
            "layers" => json!(self.layer),
            "dir" => json!(format!("{}/upper{}", self.images, self.dice.roll(3))),
            "config" | "prefetch" => json!(format!("{}/absent", self.images)),
            "socket" => json!(format!("{}/s{}.sock", self.images, self.dice.roll(3))),
            "image" => json!("127.0.0.1:1/a/b:c"),
            "disk" | "id" | "after" => json!(format!("d{}", self.dice.roll(4))),
            "snapshot" | "name" => json!(format!("s{}", self.dice.roll(3))),
            "socket_mode" => json!("0640"),
            "socket_owner" => json!("0:0"),
            "label" => json!("a=b"),
            _ => json!(format!("t{}", self.dice.roll(9))),
        }
    }

    fn object(&mut self, schema: &Value) -> Value {
        let mut fields = Map::new();
        let no_properties = Map::new();
        let properties = schema["properties"].as_object().unwrap_or(&no_properties);
        let required = schema["required"].as_array().cloned().unwrap_or_default();
        for (name, property) in properties {
            // Of the four contents, mostly the one that can be served.
            let content = ["image", "config", "from"].contains(&name.as_str());
            let chosen = match (name.as_str(), content) {
                ("layers", _) => self.dice.roll(8) > 0,
                (_, true) => self.dice.roll(8) == 0,
                _ => self.dice.roll(3) == 0,
            };
            if chosen || required.contains(&json!(name)) {
                fields.insert(name.clone(), self.value(name, property));
            }
        }
        if schema["additionalProperties"].is_object() {
            fields.insert("a".into(), self.value("a", &schema["additionalProperties"]));
        }
        Value::Object(fields)
    }

    /// Changes something of a value.
    fn mutate(&mut self, value: &mut Value) {
        let further = self.dice.roll(3) > 0;
        match value {
            Value::Object(fields) if !fields.is_empty() && further => {
                let number = self.dice.roll(fields.len());
                let name = fields.keys().nth(number).unwrap().clone();
                match self.dice.roll(4) {
                    0 => drop(fields.remove(&name)),
                    1 => drop(fields.insert(format!("{name}s"), json!(1))),
                    _ => self.mutate(fields.get_mut(&name).unwrap()),
                }
            }
            Value::Array(items) if !items.is_empty() && further => self.mutate(&mut items[0]),
            _ => *value = self.dice.one_of(&hostile()).clone(),
        }
    }

    fn request(&mut self) -> Request {
        let paths = self.description["paths"].as_object().unwrap();
        let names: Vec<_> = paths.keys().collect();
        // Half of the requests are about disks, so that there are some.
        let pattern = match self.dice.roll(2) {
            0 => "/disks/{id}".to_owned(),
            _ => (*self.dice.one_of(&names)).clone(),
        };
        let routes = &paths[&pattern];
        let has: Vec<_> = METHODS
            .iter()
            .filter(|method| routes[**method].is_object())
            .collect();
        let method = match self.dice.roll(10) {
            0 => *self.dice.one_of(&METHODS),
            _ => **self.dice.one_of(&has),
        };
        let operation = &routes[method];
        let mut target = pattern.replace("{id}", &format!("d{}", self.dice.roll(4)));
        target = target.replace("{key}", "0123456789abcdef");
        if self.dice.roll(20) == 0 {
            let odd = *self.dice.one_of(&["..", "%00", "%2e", "", "a%20b"]);
            target = pattern.replace("{id}", odd);
        }
        let mut query = Vec::new();
        for parameter in operation["parameters"].as_array().into_iter().flatten() {
            let parameter = resolved(self.description, parameter);
            let name = parameter["name"].as_str().unwrap();
            // Waits make the run long, and headers are for other tests.
            if parameter["in"] == "query" && name != "wait" && self.dice.roll(2) == 0 {
                query.push(format!(
                    "{name}={}",
                    self.parameter(name, &parameter["schema"])
                ));
            }
        }
        if self.dice.roll(20) == 0 {
            query.push(
                self.dice
                    .one_of(&["%", "=", "a=b", "force=2", "limit=-1"])
                    .to_string(),
            );
        }
        if !query.is_empty() {
            target = format!("{target}?{}", query.join("&"));
        }
        let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
        let mut body = String::new();
        if !schema.is_null() {
            let mut value = self.value("", schema);
            if self.dice.roll(3) == 0 {
                self.mutate(&mut value);
            }
            body = value.to_string();
            if self.dice.roll(30) == 0 {
                let mut half = (0..=body.len() / 2).rev();
                let half = half.find(|at| body.is_char_boundary(*at)).unwrap();
                body.truncate(half);
            }
        }
        let base = if pattern == "/metrics" { "!" } else { "" };
        Request {
            method: method.to_uppercase(),
            target: format!("{base}{target}"),
            pattern,
            body,
        }
    }

    fn parameter(&mut self, name: &str, schema: &Value) -> String {
        let value = match schema["type"].as_str() {
            Some("array") => self.value(name, &schema["items"]),
            _ => self.value(name, schema),
        };
        value
            .as_str()
            .map_or_else(|| value.to_string(), str::to_owned)
    }
}

/// Checks an answer against the description.
fn check(description: &Value, request: &Request, (status, body): &(u16, Value)) -> Option<String> {
    let operation = &description["paths"][&request.pattern][request.method.to_lowercase()];
    let answers = &operation["responses"];
    let schema = |answer: &Value| {
        let content = resolved(description, answer)["content"]["application/json"].clone();
        content["schema"].clone()
    };
    if *status < 300 {
        let answer = &answers[status.to_string()];
        return match answer.is_object() {
            true => misfit(description, &schema(answer), body),
            false => Some(format!("{status} is not described")),
        };
    }
    let error = schema(&description["components"]["responses"]["Failure"]);
    if *status == 500 || *status == 507 || *status == 504 {
        return Some("an error of the server".to_owned());
    }
    misfit(description, &error, body)
}

#[test]
fn whatever_is_sent_is_answered_as_described() {
    let node = Node::start();
    let text = node.get("/openapi.yaml").1.as_str().unwrap().to_owned();
    let description = parse(&text);
    let mut maker = Maker {
        description: &description,
        dice: Dice(0x9e37_79b9_7f4a_7c15),
        layer: layer(&node, "a.obd", 7),
        images: node.images().to_str().unwrap().to_owned(),
    };
    let count = env::var("OVBD_API_FUZZ").ok();
    let count = count.map_or(REQUESTS, |count| count.parse().unwrap());
    let mut seen = BTreeSet::new();
    for number in 0..count {
        let request = maker.request();
        let answer = node.request(&request.method, &request.target, &request.body);
        let code = answer.1["code"].as_str().unwrap_or_default().to_owned();
        if let Some(wrong) = check(&description, &request, &answer) {
            let Request {
                method,
                target,
                body,
                ..
            } = request;
            panic!(
                "request {number}: {method} {target} {body}\n{wrong}\n{} {}",
                answer.0, answer.1
            );
        }
        if answer.0 == 201 {
            let again = node.request(&request.method, &request.target, &request.body);
            assert_eq!(
                again.0, 200,
                "{} {}: {}",
                request.target, request.body, again.1
            );
        }
        seen.insert((request.pattern, request.method, answer.0, code));
    }
    // The requests get past the first check.
    let has = |pattern: &str, method: &str, status: u16| {
        seen.iter()
            .any(|(p, m, s, _)| (p.as_str(), m.as_str(), *s) == (pattern, method, status))
    };
    for (pattern, method, status) in [
        ("/disks/{id}", "PUT", 201),
        ("/disks/{id}", "PUT", 204),
        ("/disks/{id}", "PUT", 409),
        ("/disks/{id}", "PATCH", 200),
        ("/disks/{id}", "DELETE", 204),
        ("/disks/{id}/size", "PUT", 200),
        ("/disks/{id}/snapshots", "POST", 200),
        ("/disks/{id}/restart", "POST", 200),
        ("/disks/{id}/stats", "GET", 200),
    ] {
        assert!(
            has(pattern, method, status) || count < REQUESTS,
            "{method} {pattern}: {status}: {seen:?}"
        );
    }
    assert_eq!(node.get("/health/live").0, 200);
}

/// Each route with each method: the description decides which there are.
#[test]
fn each_route_has_the_methods_that_are_described() {
    let node = Node::start();
    let text = node.get("/openapi.yaml").1.as_str().unwrap().to_owned();
    let description = parse(&text);
    let mut operations = BTreeSet::new();
    for (pattern, routes) in description["paths"].as_object().unwrap() {
        let base = if pattern == "/metrics" { "!" } else { "" };
        let target = pattern.replace("{id}", "none").replace("{key}", "none");
        let target = format!("{base}{target}");
        for method in METHODS {
            let (status, body) = node.request(&method.to_uppercase(), &target, "");
            let described = routes[method].is_object();
            assert_eq!(
                status != 405,
                described,
                "{method} {pattern}: {status} {body}"
            );
            if described {
                let id = routes[method]["operationId"].as_str().unwrap();
                assert!(operations.insert(id.to_owned()), "{id} occurs twice");
                let answers = routes[method]["responses"].as_object().unwrap();
                assert!(answers.contains_key("default"), "{method} {pattern}");
                let known = status >= 400 || answers.contains_key(&status.to_string());
                assert!(known, "{method} {pattern}: {status} is not described");
            }
        }
        let (status, body) = node.request("HEAD", &target, "");
        let (get, _) = node.get(&target);
        assert_eq!((status, body), (get, "".into()), "HEAD {pattern}");
    }
}
