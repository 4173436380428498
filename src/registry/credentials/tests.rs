//! Files of credentials as Docker and upstream write them, and damaged ones.

use super::super::repository::Scheme;
use super::*;

fn repository(host: &str, name: &str) -> Repository {
    Repository::new(Scheme::Https, host.parse().unwrap(), name).unwrap()
}

fn find(text: &str, host: &str, name: &str) -> Result<Option<Credential>, Error> {
    Credentials::parse(text.as_bytes(), "F")?.find(&repository(host, name))
}

fn password(user: &str, password: &str) -> Option<Credential> {
    Some(Credential::Password {
        user: user.to_owned(),
        password: password.to_owned(),
    })
}

#[test]
fn the_longest_prefix_wins() {
    let text = r#"{"auths":{
        "r.example":{"username":"all","password":"1"},
        "r.example/a":{"username":"a","password":"1"},
        "https://r.example/a/b/":{"username":"ab","password":"1"},
        "r.example:5000":{"username":"port","password":"1"},
        "R.Other/v2/":{"auth":"dTpwOng="}
    }}"#;
    for (host, name, expected) in [
        ("r.example", "x", password("all", "1")),
        ("r.example", "a", password("a", "1")),
        ("r.example", "a/c", password("a", "1")),
        ("r.example", "a/b/c", password("ab", "1")),
        ("r.example", "ab", password("all", "1")),
        ("r.example:5000", "a", password("port", "1")),
        ("r.other", "a", password("u", "p:x")),
        ("r.unknown", "a", None),
        ("ar.example", "a", None),
    ] {
        assert_eq!(find(text, host, name).unwrap(), expected, "{host}/{name}");
    }
}

#[test]
fn docker_hub_has_many_names() {
    for key in [
        "https://index.docker.io/v1/",
        "index.docker.io",
        "docker.io",
        "registry-1.docker.io",
        "https://registry-1.docker.io/v2/",
    ] {
        let text = format!(r#"{{"auths":{{"{key}":{{"username":"u","password":"p"}}}}}}"#);
        let found = find(&text, "docker.io", "library/redis").unwrap();
        assert_eq!(found, password("u", "p"), "{key}");
    }
}

#[test]
fn tokens_are_taken() {
    let text = r#"{"auths":{
        "a":{"auth":"dTo=","identitytoken":"I"},
        "b":{"username":"<token>","password":"J"},
        "c":{"auth":"dTpw","registrytoken":"R"},
        "d":{"auth":"dTpwAAA="}
    }}"#;
    let identity = |user: &str, token: &str| {
        let (user, token) = (user.to_owned(), token.to_owned());
        Some(Credential::Identity { user, token })
    };
    assert_eq!(find(text, "a", "x").unwrap(), identity("u", "I"));
    assert_eq!(find(text, "b", "x").unwrap(), identity("", "J"));
    let registry = Some(Credential::Registry("R".to_owned()));
    assert_eq!(find(text, "c", "x").unwrap(), registry);
    assert_eq!(find(text, "d", "x").unwrap(), password("u", "p"));
}

#[test]
fn programs_are_refused_where_they_would_be_needed() {
    let text = r#"{
        "auths":{"a":{},"b":{"auth":"dTpw"},"docker.io":{},"https://index.docker.io/v1/":{"auth":"dTpw"}},
        "credHelpers":{"https://c":"ecr-login"},
        "credsStore":"desktop"
    }"#;
    for (host, program) in [("a", "desktop"), ("c", "ecr-login")] {
        let refused = find(text, host, "x").unwrap_err();
        assert!(matches!(&refused, Error::Helper { program: name, .. } if name == program));
        assert!(refused.to_string().contains("uds"), "{refused}");
    }
    assert_eq!(find(text, "b", "x").unwrap(), password("u", "p"));
    assert_eq!(find(text, "docker.io", "x").unwrap(), password("u", "p"));
    assert_eq!(find(text, "d", "x").unwrap(), None);
}

#[test]
fn damaged_files_are_refused_without_their_secrets() {
    for text in [
        "",
        "[]",
        "{",
        r#"{"auths":[]}"#,
        r#"{"auths":{"a":5}}"#,
        r#"{"auths":{"a":{"password":"SECRET","username":5}}}"#,
        r#"{"auths":{"a":{"auth":"SECRET!"}}}"#,
        r#"{"auths":{"a":{"auth":"U0VDUkVU"}}}"#,
        r#"{"auths":{"a":{"password":"SECRET"}}}"#,
        r#"{"auths":{"a":{"username":"x"}}}"#,
        r#"{"auths":{"a":{"username":"x:y","password":"SECRET"}}}"#,
        r#"{"auths":{"a":{"registrytoken":"SECRET\n"}}}"#,
    ] {
        let refused = find(text, "a", "x").unwrap_err();
        assert!(
            !format!("{refused}{refused:?}").contains("SECRET"),
            "{refused:?}"
        );
    }
    let held = format!("{:?}", password("u", "SECRET"));
    assert!(!held.contains("SECRET"));
}
