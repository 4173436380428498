//! Times that servers set, with bounds: the pause before the next request, and the lifetime of a signed URL.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::date::{http_date, iso_date};
use super::url::{Url, decode};

/// Longest wait that a `Retry-After` header can impose.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);

/// Longest time for which a redirect's target is used again.
const MAX_TARGET_LIFETIME: Duration = Duration::from_secs(300);

/// Time before its expiry from which a signed URL is not used.
const EXPIRY_MARGIN: u64 = 30;

/// The wait that a `Retry-After` header asks for, in seconds or as a date. `date` is the answer's
/// `Date` header: the server's clock, by which its other dates are to be read.
pub fn retry_after(value: &str, date: Option<&str>) -> Option<Duration> {
    let value = value.trim();
    let is_number = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
    let seconds = if is_number {
        value.parse().unwrap_or(u64::MAX)
    } else {
        http_date(value)?.saturating_sub(now(date))
    };
    Some(Duration::from_secs(seconds).min(MAX_RETRY_AFTER))
}

/// How long a redirect's target may be used without asking the registry again. `date` is the
/// `Date` header of the answer that redirected.
pub fn target_lifetime(target: &Url, date: Option<&str>) -> Duration {
    let seconds = lifetime_hint(target, now(date));
    let seconds = seconds.map(|seconds| seconds.saturating_sub(EXPIRY_MARGIN));
    seconds.map_or(MAX_TARGET_LIFETIME, |seconds| {
        Duration::from_secs(seconds).min(MAX_TARGET_LIFETIME)
    })
}

/// Seconds for which the target's own parameters say that it is valid.
fn lifetime_hint(target: &Url, now: u64) -> Option<u64> {
    // S3 and Google: a start and a duration.
    for (date, expires) in [
        ("x-amz-date", "x-amz-expires"),
        ("x-goog-date", "x-goog-expires"),
    ] {
        let start = target
            .parameter(date)
            .and_then(|text| iso_date(&decode(text)));
        let duration = target.parameter(expires).and_then(|text| text.parse().ok());
        if let Some((start, duration)) = start.zip::<u64>(duration) {
            return Some(start.saturating_add(duration).saturating_sub(now));
        }
    }
    let azure = || {
        target
            .parameter("se")
            .and_then(|text| iso_date(&decode(text)))
    };
    let epoch = || {
        target
            .parameter("expires")
            .and_then(|text| text.parse().ok())
    };
    let verify = || {
        let (epoch, _) = target.parameter("verify")?.split_once('-')?;
        epoch.parse().ok()
    };
    let end: u64 = azure().or_else(epoch).or_else(verify)?;
    Some(end.saturating_sub(now))
}

/// The server's clock if it is known, else this machine's.
fn now(date: Option<&str>) -> u64 {
    date.and_then(http_date).unwrap_or_else(|| {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
        since_epoch.map_or(0, |duration| duration.as_secs())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATE: Option<&str> = Some("Fri, 24 May 2013 00:00:00 GMT");

    #[test]
    fn retry_after_is_bounded() {
        for (value, expected) in [
            ("0", Some(0)),
            ("7", Some(7)),
            (" 7 ", Some(7)),
            ("31536000", Some(300)),
            ("99999999999999999999999", Some(300)),
            ("Fri, 24 May 2013 00:00:09 GMT", Some(9)),
            ("Thu, 23 May 2013 00:00:00 GMT", Some(0)),
            ("Sat, 24 May 2014 00:00:00 GMT", Some(300)),
            ("", None),
            ("-7", None),
            ("soon", None),
            ("1.5", None),
        ] {
            let expected = expected.map(Duration::from_secs);
            assert_eq!(retry_after(value, DATE), expected, "{value}");
        }
    }

    #[test]
    fn signed_urls_are_dropped_before_they_expire() {
        for (query, expected) in [
            ("", 300),
            ("?X-Amz-Date=20130524T000000Z&X-Amz-Expires=1200", 300),
            ("?X-Amz-Date=20130524T000000Z&X-Amz-Expires=100", 70),
            ("?X-Amz-Date=20130523T235950Z&X-Amz-Expires=100", 60),
            ("?X-Amz-Date=20130523T000000Z&X-Amz-Expires=100", 0),
            (
                "?X-Amz-Date=20130524T000000Z&X-Amz-Expires=18446744073709551615",
                300,
            ),
            ("?X-Amz-Date=x&X-Amz-Expires=100", 300),
            ("?X-Goog-Date=20130524T000000Z&X-Goog-Expires=60", 30),
            ("?se=2013-05-24T00%3A01%3A40Z&sig=x", 70),
            ("?Expires=1369353700&Signature=x", 70),
            ("?verify=1369353700-abc%3D", 70),
            ("?expires=0", 0),
            ("?Expires=-1", 300),
            ("?Expires=&se=&verify=", 300),
        ] {
            let target = Url::parse(&format!("https://h/p{query}")).unwrap();
            let expected = Duration::from_secs(expected);
            assert_eq!(target_lifetime(&target, DATE), expected, "{query}");
        }
    }

    #[test]
    fn a_wrong_clock_here_changes_nothing() {
        // This machine's clock is years away from the server's.
        let target = "https://h/p?X-Amz-Date=20130524T000000Z&X-Amz-Expires=100";
        let target = Url::parse(target).unwrap();
        assert_eq!(target_lifetime(&target, DATE), Duration::from_secs(70));
        assert_eq!(target_lifetime(&target, None), Duration::ZERO);
    }
}
