//! Logins under a served disk: challenges in every form, tokens that stop working, refresh tokens.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::registry_server::{Received, Reply, Server, answer, serve};
use common::remote::{Layers, Place};
use serde_json::json;

use super::Reader;

/// A way to ask for a login. `R` stands for the URL of the token server.
struct Form {
    name: &'static str,
    challenge: &'static str,
    /// The answer to a token that is no longer good.
    expired: fn(&str) -> Reply,
    /// Whether the credentials are a refresh token, and whether the token server takes it by `POST`.
    refresh: Option<bool>,
}

fn challenge(text: &str) -> Reply {
    answer(401, &[("WWW-Authenticate", text)], b"")
}

const FORMS: [Form; 5] = [
    Form {
        name: "two challenges in odd case",
        challenge: r#"Negotiate, bAsIc realm="x, y", bEARER service="a,b" , realm="R",x=y"#,
        expired: challenge,
        refresh: None,
    },
    Form {
        name: "Harbor's Basic for an expired token",
        challenge: r#"Bearer realm="R",service="harbor-registry",scope="repository:team/app:pull""#,
        expired: |_| challenge("Basic realm=\"harbor\""),
        refresh: None,
    },
    Form {
        name: "ECR's 403 without a challenge",
        challenge: r#"Bearer realm="R""#,
        expired: |_| answer(403, &[], b"expired"),
        refresh: None,
    },
    Form {
        name: "a refresh token",
        challenge: r#"Bearer realm="R",service="s""#,
        expired: challenge,
        refresh: Some(true),
    },
    Form {
        name: "a refresh token that is not taken by POST",
        challenge: r#"Bearer realm="R",service="s""#,
        expired: challenge,
        refresh: Some(false),
    },
];

/// The number of a token, from 1.
fn number(request: &Received) -> Option<usize> {
    request
        .header("authorization")?
        .strip_prefix("Bearer T")?
        .parse()
        .ok()
}

/// Serves a disk, makes all tokens useless while a guest reads, and reads on.
#[test]
fn every_form_of_login_serves_a_disk_and_is_repeated() {
    for form in &FORMS {
        let (layers, place) = (Layers::new(2), Place::default());
        let given = Arc::<AtomicUsize>::default();
        let next = Arc::clone(&given);
        let refresh = form.refresh;
        let tokens = Server::start(move |request| {
            if request.method == "POST" && refresh != Some(true) {
                return answer(405, &[], b"");
            }
            let number = next.fetch_add(1, Ordering::SeqCst) + 1;
            let body = format!(r#"{{"access_token":"T{number}","expires_in":3600}}"#);
            answer(200, &[], body.as_bytes())
        });
        // Tokens below this number are no longer good.
        let least = Arc::new(AtomicUsize::new(1));
        let good = Arc::clone(&least);
        let text = form
            .challenge
            .replace("\"R\"", &format!("\"{}\"", tokens.url("/t")));
        let expired = form.expired;
        let registry = layers.registry_that(move |request, blob| match number(request) {
            Some(number) if number >= good.load(Ordering::SeqCst) => serve(request, blob),
            Some(_) => expired(&text),
            None => challenge(&text),
        });
        let entry = match form.refresh {
            Some(_) => json!({"identitytoken": "I&"}),
            None => json!({"username": "user", "password": "pass"}),
        };
        let auths = json!({"auths": {registry.host(): entry}});
        std::fs::write(place.path("auth"), auths.to_string()).expect("credentials");
        place.config("http", &registry.host(), &layers.lowers(), json!({}));
        let auth = place.path("auth").display().to_string();
        let daemon = place.serve(&["--credentials", &auth]);
        let mut reader = Reader::connect(&daemon);
        reader.ask([0]);
        reader.check(&layers.content);
        assert_eq!(given.load(Ordering::SeqCst), 1, "{}", form.name);

        least.store(2, Ordering::SeqCst);
        reader.check_all(&layers.content);
        let second = given.load(Ordering::SeqCst);
        assert_eq!(second, 2, "{}: tokens", form.name);
        check_token_requests(form, &tokens.received());
    }
}

/// What a token server was asked with.
fn check_token_requests(form: &Form, asked: &[Received]) {
    for request in asked {
        match (form.refresh, request.method.as_str()) {
            (Some(_), "POST") => {
                assert!(request.body.ends_with("&refresh_token=I%26"), "{request:?}");
            }
            (Some(_), _) => {
                let given = request.header("authorization");
                assert_eq!(given, Some("Basic PHRva2VuPjpJJg=="), "{}", form.name);
            }
            (None, _) => {
                let given = request.header("authorization");
                assert_eq!(given, Some("Basic dXNlcjpwYXNz"), "{}", form.name);
                assert!(
                    request
                        .target
                        .contains("scope=repository%3Ateam%2Fapp%3Apull")
                );
            }
        }
    }
    let posts = asked
        .iter()
        .filter(|request| request.method == "POST")
        .count();
    assert_eq!(posts > 0, form.refresh.is_some(), "{}", form.name);
}
