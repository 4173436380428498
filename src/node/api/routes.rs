//! The routes.

use hyper::Method;
use hyper::header::{ALLOW, HeaderValue};

use super::actions::Action;
use super::query::decode;
use super::reply::{self, Reply};
use crate::node::error::{Code, Failure};

/// Method, pattern and action of each route. A segment in braces stands for any one.
const ROUTES: [(&str, &str, Action); 20] = [
    ("GET", "/api/v1/disks", Action::ListDisks),
    ("PUT", "/api/v1/disks/{id}", Action::PutDisk),
    ("GET", "/api/v1/disks/{id}", Action::GetDisk),
    ("PATCH", "/api/v1/disks/{id}", Action::PatchDisk),
    ("DELETE", "/api/v1/disks/{id}", Action::DeleteDisk),
    ("PUT", "/api/v1/disks/{id}/size", Action::ResizeDisk),
    ("GET", "/api/v1/disks/{id}/stats", Action::DiskStats),
    ("POST", "/api/v1/disks/{id}/restart", Action::RestartDisk),
    ("GET", "/api/v1/disks/{id}/snapshots", Action::ListSnapshots),
    ("POST", "/api/v1/disks/{id}/snapshots", Action::MakeSnapshot),
    ("POST", "/api/v1/reload", Action::Reload),
    ("GET", "/api/v1/images", Action::ListImages),
    ("GET", "/api/v1/images/{key}", Action::GetImage),
    ("GET", "/api/v1/config", Action::Config),
    ("GET", "/api/v1/events", Action::Events),
    ("GET", "/api/v1/health/live", Action::Live),
    ("GET", "/api/v1/health/ready", Action::Ready),
    ("GET", "/api/v1/version", Action::Version),
    ("GET", "/api/v1/openapi.yaml", Action::OpenApi),
    ("GET", "/metrics", Action::Metrics),
];

/// The route of a request.
#[derive(Debug, PartialEq, Eq)]
pub struct Found {
    /// Its action.
    pub action: Action,
    /// Its pattern.
    pub pattern: &'static str,
    /// The segment of the path that stands for the one in braces, decoded.
    pub id: Option<String>,
}

/// Finds the route of a request.
///
/// # Errors
/// The answer, if there is none.
pub fn route(method: &Method, path: &str) -> Result<Found, Box<Reply>> {
    let mut allowed = Vec::new();
    for (known, pattern, action) in ROUTES {
        let Some(id) = matches(pattern, path) else {
            continue;
        };
        if method.as_str() != known {
            allowed.push(known);
            continue;
        }
        return Ok(Found {
            action,
            pattern,
            id: id.map(decode),
        });
    }
    if allowed.is_empty() {
        let failure = Failure::new(
            Code::NotFound,
            format!("no route {path}; see /api/v1/openapi.yaml"),
        );
        return Err(Box::new(reply::failure(&failure)));
    }
    let failure = Failure::new(
        Code::Method,
        format!("{path} takes {}, not {method}", allowed.join(", ")),
    );
    let mut refused = reply::failure(&failure);
    if let Ok(value) = HeaderValue::from_str(&allowed.join(", ")) {
        refused.headers_mut().insert(ALLOW, value);
    }
    Err(Box::new(refused))
}

/// Whether `path` fits `pattern`, and the segment that stands for the one in braces.
fn matches<'p>(pattern: &str, path: &'p str) -> Option<Option<&'p str>> {
    let (mut wanted, mut given) = (pattern.split('/'), path.split('/'));
    let mut id = None;
    loop {
        match (wanted.next(), given.next()) {
            (None, None) => return Some(id),
            (Some(want), Some(have)) if want.starts_with('{') => id = Some(have),
            (Some(want), Some(have)) if want == have => {}
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use hyper::StatusCode;

    use super::super::actions::OPENAPI;
    use super::*;

    #[test]
    fn paths_find_their_routes() {
        let found = |method: Method, path: &str| {
            let found = route(&method, path).ok();
            found.map(|found| (found.action, found.id))
        };
        let id = |id: &str| Some(id.to_owned());
        for (method, path, expected) in [
            (Method::GET, "/api/v1/disks", (Action::ListDisks, None)),
            (
                Method::PUT,
                "/api/v1/disks/a.b",
                (Action::PutDisk, id("a.b")),
            ),
            (
                Method::PUT,
                "/api/v1/disks/a%2eb",
                (Action::PutDisk, id("a.b")),
            ),
            // Decoded once, and then no id.
            (
                Method::GET,
                "/api/v1/disks/%252e",
                (Action::GetDisk, id("%2e")),
            ),
            (
                Method::GET,
                "/api/v1/disks/%2e%2e",
                (Action::GetDisk, id("..")),
            ),
            (Method::GET, "/api/v1/disks/", (Action::GetDisk, id(""))),
        ] {
            assert_eq!(found(method, path), Some(expected), "{path}");
        }
        for path in ["/api/v1/disks/a/b", "/x", "/api/v1/disks/../metrics"] {
            assert_eq!(found(Method::GET, path), None, "{path}");
        }
        let refused = route(&Method::POST, "/api/v1/disks/a").unwrap_err();
        assert_eq!(refused.status(), StatusCode::METHOD_NOT_ALLOWED);
        assert_eq!(refused.headers()[ALLOW], "PUT, GET, PATCH, DELETE");
    }

    #[test]
    fn the_routes_are_those_of_openapi_yaml() {
        let mut described = Vec::new();
        let mut path = String::new();
        for line in OPENAPI.lines() {
            if let Some(name) = line
                .strip_prefix("  /")
                .and_then(|line| line.strip_suffix(':'))
            {
                path = format!("/{name}");
            }
            for method in ["get", "put", "post", "delete", "patch"] {
                if line == format!("    {method}:") {
                    described.push((method.to_uppercase(), path.clone()));
                }
            }
        }
        let known = ROUTES.iter().map(|(method, path, _)| {
            let path = path.trim_start_matches("/api/v1").to_owned();
            ((*method).to_owned(), path)
        });
        let mut known: Vec<_> = known.collect();
        known.sort();
        described.sort();
        assert_eq!(described, known);
    }
}
