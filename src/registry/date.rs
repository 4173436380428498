//! Points in time as HTTP headers and signed URLs write them, in seconds of the Unix epoch.

/// Reads an HTTP date, `Sun, 06 Nov 1994 08:49:37 GMT` (RFC 9110, 5.6.7; not its obsolete forms).
pub fn http_date(text: &str) -> Option<u64> {
    let (_, rest) = text.trim().split_once(", ")?;
    let fields: Vec<_> = rest.split(' ').collect();
    let [day, month, year, time, "GMT"] = fields[..] else {
        return None;
    };
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let month = MONTHS.iter().position(|name| *name == month)?;
    let month = u64::try_from(month).ok()? + 1;
    let time: Vec<_> = time.split(':').collect();
    let [hour, minute, second] = time[..] else {
        return None;
    };
    seconds(
        [number(year, 4)?, month, number(day, 2)?],
        [number(hour, 2)?, number(minute, 2)?, number(second, 2)?],
    )
}

/// Reads an ISO 8601 time in UTC, `2024-01-31T12:00:00Z` or `20240131T120000Z`.
pub fn iso_date(text: &str) -> Option<u64> {
    let (date, time) = text.trim().strip_suffix('Z')?.split_once('T')?;
    let time = time.split('.').next().unwrap_or_default();
    let date = date.replace('-', "");
    let time = time.replace(':', "");
    if !date.is_ascii() || date.len() != 8 || !time.is_ascii() || !matches!(time.len(), 4 | 6) {
        return None;
    }
    let second = time.get(4..6).map_or(Some(0), |text| number(text, 2))?;
    seconds(
        [
            number(&date[..4], 4)?,
            number(&date[4..6], 2)?,
            number(&date[6..], 2)?,
        ],
        [number(&time[..2], 2)?, number(&time[2..4], 2)?, second],
    )
}

/// Reads `len` digits.
fn number(text: &str, len: usize) -> Option<u64> {
    let digits = text.len() == len && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok())?
}

/// Seconds from 1970 to a date of the Gregorian calendar.
fn seconds([year, month, day]: [u64; 3], [hour, minute, second]: [u64; 3]) -> Option<u64> {
    let valid = (1970..=9999).contains(&year)
        && (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && hour < 24
        && minute < 60
        && second <= 60;
    if !valid {
        return None;
    }
    // Years that begin in March have their leap day at the end.
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let leap_days = year / 4 - year / 100 + year / 400;
    let days = year * 365 + leap_days + (month * 153 + 2) / 5 + day - 1;
    /// Days from 1 March of year 0 to 1 January 1970.
    const EPOCH: u64 = 719_468;
    let days = days.checked_sub(EPOCH)?;
    Some(days * 86400 + hour * 3600 + minute * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_read() {
        for (text, expected) in [
            ("Sun, 06 Nov 1994 08:49:37 GMT", 784_111_777),
            ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
            ("Thu, 29 Feb 2024 23:59:59 GMT", 1_709_251_199),
        ] {
            assert_eq!(http_date(text), Some(expected), "{text}");
        }
        for (text, expected) in [
            ("20130524T000000Z", 1_369_353_600),
            ("2013-05-24T00:00:00Z", 1_369_353_600),
            ("2013-05-24T00:00Z", 1_369_353_600),
            ("2013-05-24T00:00:01.1234567Z", 1_369_353_601),
            ("9999-12-31T23:59:59Z", 253_402_300_799),
        ] {
            assert_eq!(iso_date(text), Some(expected), "{text}");
        }
    }

    #[test]
    fn other_texts_are_refused() {
        for text in [
            "",
            "0",
            "Sun, 06 Nov 1994 08:49:37",
            "Sun, 06 Nov 1994 08:49 GMT",
            "Sun, 06 Xxx 1994 08:49:37 GMT",
            "Sun, 6 Nov 1994 08:49:37 GMT",
            "Sun, 06 Nov 1800 08:49:37 GMT",
            "Sun, 32 Nov 1994 08:49:37 GMT",
            "Sun, 06 Nov 99999999999999999999 08:49:37 GMT",
            "Sunday, 06-Nov-94 08:49:37 GMT",
        ] {
            assert_eq!(http_date(text), None, "{text}");
        }
        for text in [
            "",
            "Z",
            "T",
            "TZ",
            "20130524T000000",
            "2013-13-24T00:00:00Z",
            "2013-05-24T24:00:00Z",
            "20130524T00000é",
            "20130524T00é0Z",
            "é130524T000000Z",
            "-------T:::::Z",
        ] {
            assert_eq!(iso_date(text), None, "{text}");
        }
    }
}
