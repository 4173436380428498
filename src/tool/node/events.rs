//! Events as lines of text.

use serde_json::Value;

use crate::tool::table::printable;

/// Returns the number to ask for next, and the lines of a batch of events.
pub fn lines(batch: &Value) -> (u64, String) {
    let mut text = String::new();
    if batch["lost"].as_bool() == Some(true) {
        text += "events were lost: the node was started again, or keeps only newer events\n";
    }
    for event in batch["events"].as_array().into_iter().flatten() {
        let field = |name: &str| printable(event[name].as_str().unwrap_or("-"));
        let time = event["time"].as_u64().unwrap_or_default();
        text += &format!("{} {:<20} {:<17}", utc(time), field("disk"), field("event"));
        if let Some(reason) = event["reason"].as_str() {
            text = text + " " + &printable(reason);
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    (batch["next"].as_u64().unwrap_or_default(), text)
}

/// Date and time in UTC, as `2026-11-28T20:42:24Z`, from seconds since 1970.
fn utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Years start in March, so that the leap day is the last day of a year.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3_600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_795_898_544, "2026-11-28T20:42:24Z"),
            (4_107_542_399, "2100-02-28T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(utc(seconds), text);
        }
    }

    #[test]
    fn an_event_is_one_line() {
        let batch = json!({
            "next": 9, "lost": true,
            "events": [{ "number": 9, "time": 0, "disk": "a", "event": "failed", "reason": "x\ny" }],
        });
        let (next, text) = lines(&batch);
        assert_eq!((next, text.lines().count()), (9, 2), "{text}");
        assert!(text.ends_with("failed            x\\ny\n"), "{text}");
    }
}
