//! Parser of `WWW-Authenticate`: the authentication that a registry requires (RFC 9110, 11.6.1).
//!
//! Real headers hold several challenges, unknown parameters, odd case and commas inside quotes, so
//! parsing is lenient: what cannot be understood is skipped, and nothing here is an error.

/// Most challenges that are looked at.
const MAX_CHALLENGES: usize = 16;

/// Longest value of a parameter that is taken, in bytes.
const MAX_VALUE: usize = 4096;

/// One way to authenticate that a registry offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Challenge {
    /// User name and password with every request.
    Basic,
    /// A token from another server.
    Bearer(Bearer),
}

/// Token server, service and scope of a bearer token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bearer {
    realm: String,
    service: Option<String>,
    scope: Option<String>,
}

impl Bearer {
    /// URL of the token server.
    pub fn realm(&self) -> &str {
        &self.realm
    }

    /// Name by which the token server knows the registry.
    pub fn service(&self) -> Option<&str> {
        self.service.as_deref()
    }

    /// Scope that the token must have.
    pub fn scope(&self) -> Option<&str> {
        self.scope.as_deref()
    }
}

/// The strongest challenge in the values of all `WWW-Authenticate` headers of an answer: a token
/// before a password.
pub fn strongest<'a>(headers: impl IntoIterator<Item = &'a str>) -> Option<Challenge> {
    let mut best = None;
    let challenges = headers.into_iter().flat_map(parse).take(MAX_CHALLENGES);
    for challenge in challenges {
        match challenge {
            Challenge::Bearer(_) => return Some(challenge),
            Challenge::Basic => best = Some(challenge),
        }
    }
    best
}

/// The challenges of one header that this program supports, in their order.
pub fn parse(header: &str) -> Vec<Challenge> {
    let mut rest = Cursor(header.as_bytes());
    let mut found = Vec::new();
    // Parameters before the first scheme belong to no challenge.
    let mut current = None;
    while !rest.0.is_empty() && found.len() < MAX_CHALLENGES {
        rest.skip(|byte| byte == b',' || is_space(byte));
        let word = rest.take(is_token);
        if word.is_empty() {
            // Not a token: no grammar allows this byte here.
            rest.0 = rest.0.get(1..).unwrap_or_default();
            continue;
        }
        rest.skip(is_space);
        if rest.0.first() != Some(&b'=') {
            found.extend(current.replace(Draft::new(word)).and_then(Draft::finish));
            continue;
        }
        rest.0 = &rest.0[1..];
        rest.skip(is_space);
        let value = rest.value();
        if let Some(draft) = &mut current {
            draft.set(word, value);
        }
    }
    found.extend(current.and_then(Draft::finish));
    found.truncate(MAX_CHALLENGES);
    found
}

/// A challenge whose parameters are being read.
struct Draft {
    scheme: String,
    parameters: Bearer,
}

impl Draft {
    fn new(scheme: &[u8]) -> Draft {
        Draft {
            scheme: String::from_utf8_lossy(scheme).to_ascii_lowercase(),
            parameters: Bearer::default(),
        }
    }

    /// Takes a parameter; of two with one name, the first.
    fn set(&mut self, name: &[u8], value: String) {
        let parameters = &mut self.parameters;
        let first = |slot: &mut Option<String>, value| _ = slot.get_or_insert(value);
        match name.to_ascii_lowercase().as_slice() {
            _ if value.is_empty() || value.len() > MAX_VALUE => {}
            b"realm" if parameters.realm.is_empty() => parameters.realm = value,
            b"service" => first(&mut parameters.service, value),
            b"scope" => first(&mut parameters.scope, value),
            _ => {}
        }
    }

    fn finish(self) -> Option<Challenge> {
        match self.scheme.as_str() {
            "basic" => Some(Challenge::Basic),
            "bearer" if !self.parameters.realm.is_empty() => {
                Some(Challenge::Bearer(self.parameters))
            }
            _ => None,
        }
    }
}

struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, wanted: impl Fn(u8) -> bool) -> &'a [u8] {
        let end = self.0.iter().position(|byte| !wanted(*byte));
        let (taken, rest) = self.0.split_at(end.unwrap_or(self.0.len()));
        self.0 = rest;
        taken
    }

    fn skip(&mut self, unwanted: impl Fn(u8) -> bool) {
        self.take(unwanted);
    }

    /// A parameter's value: a quoted string, whose quotes may be missing at the end, or a token.
    fn value(&mut self) -> String {
        if self.0.first() != Some(&b'"') {
            let value = self.take(|byte| byte != b',' && !is_space(byte));
            return String::from_utf8_lossy(value).into_owned();
        }
        self.0 = &self.0[1..];
        let mut value = Vec::new();
        while let [byte, rest @ ..] = self.0 {
            self.0 = rest;
            match (byte, rest) {
                (b'"', _) => break,
                (b'\\', [escaped, rest @ ..]) => {
                    value.push(*escaped);
                    self.0 = rest;
                }
                _ => value.push(*byte),
            }
        }
        String::from_utf8_lossy(&value).into_owned()
    }
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t')
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~/".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Challenge {
        Challenge::Bearer(Bearer {
            realm: realm.to_owned(),
            service: service.map(str::to_owned),
            scope: scope.map(str::to_owned),
        })
    }

    #[test]
    fn challenges_of_real_registries_are_read() {
        for (header, expected) in [
            (
                r#"Bearer realm="https://auth.example/token",service="r.example",scope="repository:a/b:pull""#,
                vec![bearer(
                    "https://auth.example/token",
                    Some("r.example"),
                    Some("repository:a/b:pull"),
                )],
            ),
            (
                r#"bEaReR   Realm = "https://a/t" , SERVICE=s,error="invalid_token""#,
                vec![bearer("https://a/t", Some("s"), None)],
            ),
            (
                r#"Bearer realm="https://a/t",scope="repository:a:pull,push repository:b:pull""#,
                vec![bearer(
                    "https://a/t",
                    None,
                    Some("repository:a:pull,push repository:b:pull"),
                )],
            ),
            (
                r#"Negotiate YIIabc==, Basic realm="a, b", Bearer realm="https://a/t""#,
                vec![Challenge::Basic, bearer("https://a/t", None, None)],
            ),
            (
                r#"Bearer realm="https://a/\"t\\",unknown="x,y=\"",service="s""#,
                vec![bearer("https://a/\"t\\", Some("s"), None)],
            ),
            ("Basic", vec![Challenge::Basic]),
            (r#"Basic realm="harbor""#, vec![Challenge::Basic]),
            (
                r#"Bearer realm="https://first/",realm="https://second/""#,
                vec![bearer("https://first/", None, None)],
            ),
            (
                r#"Bearer realm="https://cut"#,
                vec![bearer("https://cut", None, None)],
            ),
        ] {
            assert_eq!(parse(header), expected, "{header}");
        }
    }

    #[test]
    fn what_cannot_be_met_is_skipped() {
        for header in [
            "",
            ",",
            " , ,",
            "Bearer",
            "Bearer service=s",
            "Bearer realm=",
            r#"Bearer realm="""#,
            "Digest realm=x",
            "=",
            "realm=x",
            "\"",
            "\\",
            "é",
            "Bearer é",
            "Bearer=\"",
            "===",
        ] {
            assert_eq!(parse(header), [], "{header}");
        }
    }

    #[test]
    fn a_token_is_preferred_over_a_password() {
        let token = bearer("https://a/t", None, None);
        let headers = ["Basic", r#"Bearer realm="https://a/t""#];
        assert_eq!(strongest(headers), Some(token));
        assert_eq!(strongest(["Digest x=y", "Basic"]), Some(Challenge::Basic));
        assert_eq!(strongest([]), None);
    }

    #[test]
    fn long_headers_are_bounded() {
        let many = "Basic,".repeat(100_000);
        assert_eq!(parse(&many).len(), MAX_CHALLENGES);
        let long = format!("Bearer realm=\"{}\"", "x".repeat(MAX_VALUE + 1));
        assert_eq!(parse(&long), []);
    }
}
