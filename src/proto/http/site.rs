//! The ordinary web answers: a small static site, which is all that a visitor without a token sees.
//!
//! Nothing here looks at a request's upgrade or authorization, so that a tunnel that is refused and a page that does
//! not exist get the same bytes.

use std::time::{SystemTime, UNIX_EPOCH};

use super::{Request, Version};

const PAGE: &str = "<!DOCTYPE html>\n\
    <html lang=\"en\">\n\
    <head><meta charset=\"utf-8\"><title>Welcome</title></head>\n\
    <body>\n\
    <h1>Welcome</h1>\n\
    <p>There is nothing here yet.</p>\n\
    </body>\n\
    </html>\n";

/// What the built-in site says to a request, upgrade or not: its page at `/`, and that nothing else exists.
pub fn site_response(request: &Request, now: SystemTime) -> Vec<u8> {
    let reads = request.method == "GET" || request.method == "HEAD";
    let answer = match request.path() {
        _ if request.version == Version::Http11 && request.host.is_none() => {
            Answer::error(Status::BadRequest)
        }
        None => Answer::error(Status::BadRequest),
        Some("/") if reads => Answer {
            status: Status::Ok,
            field: None,
            body: PAGE.to_owned(),
        },
        Some("/") => Answer {
            field: Some(("Allow", "GET, HEAD".to_owned())),
            ..Answer::error(Status::MethodNotAllowed)
        },
        Some(_) => Answer::error(Status::NotFound),
    };
    answer.to_bytes(request.method == "HEAD", request.keep_alive, now)
}

/// What a malformed upgrade gets when its token is right (RFC 9484, section 4.2).
pub fn bad_request_response(request: &Request, now: SystemTime) -> Vec<u8> {
    Answer::error(Status::BadRequest).to_bytes(request.method == "HEAD", request.keep_alive, now)
}

/// What [`Parsed::Unreadable`](super::Parsed::Unreadable) gets, before the connection is closed.
pub fn unreadable_response(now: SystemTime) -> Vec<u8> {
    Answer::error(Status::BadRequest).to_bytes(false, false, now)
}

/// What a request in plain HTTP gets, before the connection is closed: the way to the same page by `https`.
pub fn redirect_response(request: &Request, now: SystemTime) -> Vec<u8> {
    let host = request
        .host
        .as_deref()
        .map(without_port)
        .filter(|host| !host.is_empty());
    let answer = match (host, super::request::path_and_query(&request.target)) {
        (Some(host), Some(path)) => Answer {
            field: Some(("Location", format!("https://{host}{path}"))),
            ..Answer::error(Status::MovedPermanently)
        },
        _ => Answer::error(Status::BadRequest),
    };
    answer.to_bytes(request.method == "HEAD", false, now)
}

/// The host of a Host field, whose IPv6 addresses are in brackets.
fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => host,
    }
}

#[derive(Clone, Copy)]
enum Status {
    Ok,
    MovedPermanently,
    BadRequest,
    NotFound,
    MethodNotAllowed,
}

impl Status {
    fn line(self) -> &'static str {
        match self {
            Status::Ok => "200 OK",
            Status::MovedPermanently => "301 Moved Permanently",
            Status::BadRequest => "400 Bad Request",
            Status::NotFound => "404 Not Found",
            Status::MethodNotAllowed => "405 Method Not Allowed",
        }
    }
}

struct Answer {
    status: Status,
    field: Option<(&'static str, String)>,
    body: String,
}

impl Answer {
    /// A page that says no more than the status.
    fn error(status: Status) -> Self {
        let line = status.line();
        Answer {
            status,
            field: None,
            body: format!(
                "<!DOCTYPE html>\n<html lang=\"en\">\n<head><title>{line}</title></head>\n\
                 <body><h1>{line}</h1></body>\n</html>\n"
            ),
        }
    }

    fn to_bytes(&self, head_only: bool, keep_alive: bool, now: SystemTime) -> Vec<u8> {
        let mut text = format!(
            "HTTP/1.1 {status}\r\n\
             Date: {date}\r\n\
             Content-Type: text/html; charset=utf-8\r\n\
             Content-Length: {length}\r\n\
             Connection: {connection}\r\n",
            status = self.status.line(),
            date = http_date(now),
            length = self.body.len(),
            connection = if keep_alive { "keep-alive" } else { "close" },
        );
        if let Some((name, value)) = &self.field {
            text += &format!("{name}: {value}\r\n");
        }
        text += "\r\n";
        if !head_only {
            text += &self.body;
        }
        text.into_bytes()
    }
}

/// A time as HTTP writes it (RFC 9110, section 5.6.7): `Sun, 06 Nov 1994 08:49:37 GMT`. Before 1970 it is 1970.
pub fn http_date(time: SystemTime) -> String {
    const DAY_SECONDS: u64 = 24 * 60 * 60;
    const WEEKDAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];

    let seconds = time
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let (days, second) = (seconds / DAY_SECONDS, seconds % DAY_SECONDS);
    let weekday = WEEKDAYS[(days % 7) as usize];
    let (year, month, day) = civil(days);
    format!(
        "{weekday}, {day:02} {month} {year:04} {hour:02}:{minute:02}:{second:02} GMT",
        month = MONTHS[month],
        hour = second / 3600,
        minute = second / 60 % 60,
        second = second % 60,
    )
}

/// The year, month (from 0) and day (from 1) of a day counted from 1970.
///
/// Years are taken to begin in March, so that the leap day is their last and months have a regular length.
fn civil(days: u64) -> (u64, usize, u64) {
    const ERA_DAYS: u64 = 146_097; // 400 years
    const MARCH_0000: u64 = 719_468; // days from 1 March of year 0 to 1970
    let days = days + MARCH_0000;
    let (era, day_of_era) = (days / ERA_DAYS, days % ERA_DAYS);
    // Take the leap days out: one every 4 years, none every 100, one again at the end of the era.
    let leap_days = day_of_era / 1460 + day_of_era / (ERA_DAYS - 1) - day_of_era / 36_524;
    let year_of_era = (day_of_era - leap_days) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    // Five months from March on have 153 days, whichever they are.
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12;
    let year = 400 * era + year_of_era + u64::from(month < 2);
    (year, month as usize, day)
}

#[cfg(test)]
mod tests {
    use super::super::{Parsed, parse_request};
    use super::*;
    use std::time::Duration;

    fn request(head: &str) -> Request {
        match parse_request(head.replace('\n', "\r\n").as_bytes()) {
            Parsed::Request { request, .. } => request,
            other => panic!("{other:?} for {head:?}"),
        }
    }

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn answer(head: &str) -> String {
        String::from_utf8(site_response(&request(head), at(784_111_777))).unwrap()
    }

    #[test]
    fn the_page_is_a_whole_answer() {
        let answer = answer("GET / HTTP/1.1\nHost: a\n\n");
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert_eq!(body, PAGE);
        assert_eq!(
            head.split("\r\n").collect::<Vec<_>>(),
            [
                "HTTP/1.1 200 OK",
                "Date: Sun, 06 Nov 1994 08:49:37 GMT",
                "Content-Type: text/html; charset=utf-8",
                &format!("Content-Length: {}", PAGE.len()),
                "Connection: keep-alive",
            ]
        );
    }

    #[test]
    fn every_answer_has_the_body_that_it_announces() {
        for head in [
            "GET / HTTP/1.1\nHost: a\n\n",
            "GET /x HTTP/1.1\nHost: a\n\n",
            "POST / HTTP/1.1\nHost: a\n\n",
            "GET / HTTP/1.1\n\n",
            "CONNECT a:1 HTTP/1.1\nHost: a\n\n",
        ] {
            let answer = answer(head);
            let (head, body) = answer.split_once("\r\n\r\n").unwrap();
            assert!(
                head.contains(&format!("\r\nContent-Length: {}\r\n", body.len())),
                "{answer}"
            );
        }
    }

    #[test]
    fn statuses_are_those_of_a_static_site() {
        let status = |head: &str| answer(head).split(' ').nth(1).unwrap().to_owned();
        assert_eq!(status("GET / HTTP/1.1\nHost: a\n\n"), "200");
        assert_eq!(status("GET /?q HTTP/1.1\nHost: a\n\n"), "200");
        assert_eq!(status("GET http://a/ HTTP/1.1\nHost: a\n\n"), "200");
        assert_eq!(status("GET / HTTP/1.0\n\n"), "200");
        assert_eq!(status("HEAD / HTTP/1.1\nHost: a\n\n"), "200");
        assert_eq!(status("POST / HTTP/1.1\nHost: a\n\n"), "405");
        assert_eq!(status("GET /x HTTP/1.1\nHost: a\n\n"), "404");
        assert_eq!(status("GET / HTTP/1.1\n\n"), "400");
        assert_eq!(status("CONNECT a:1 HTTP/1.1\nHost: a\n\n"), "400");
        assert!(answer("POST / HTTP/1.1\nHost: a\n\n").contains("\r\nAllow: GET, HEAD\r\n"));
    }

    #[test]
    fn head_is_get_without_the_body() {
        for target in ["/", "/x"] {
            let get = answer(&format!("GET {target} HTTP/1.1\nHost: a\n\n"));
            let head = answer(&format!("HEAD {target} HTTP/1.1\nHost: a\n\n"));
            assert_eq!(head, get[..get.find("\r\n\r\n").unwrap() + 4]);
        }
    }

    #[test]
    fn a_refused_tunnel_looks_like_a_page_that_does_not_exist() {
        let missing = answer("GET /missing HTTP/1.1\nHost: a\n\n");
        let upgrade = "Connection: Upgrade\nUpgrade: connect-ip\n";
        for fields in [
            "",
            upgrade,
            &format!("{upgrade}Capsule-Protocol: ?1\n"),
            &format!(
                "{upgrade}Capsule-Protocol: ?1\nAuthorization: Bearer {}\n",
                "A".repeat(43)
            ),
        ] {
            let tunnel = format!("GET /.well-known/masque/ip/*/*/ HTTP/1.1\nHost: a\n{fields}\n");
            assert_eq!(answer(&tunnel), missing, "{fields:?}");
        }
    }

    #[test]
    fn connections_are_closed_when_they_cannot_go_on() {
        assert!(answer("GET / HTTP/1.0\n\n").contains("\r\nConnection: close\r\n"));
        assert!(
            answer("GET / HTTP/1.1\nHost: a\nConnection: close\n\n")
                .contains("\r\nConnection: close\r\n")
        );
        let unreadable = String::from_utf8(unreadable_response(at(0))).unwrap();
        assert!(unreadable.starts_with("HTTP/1.1 400 Bad Request\r\n"));
        assert!(unreadable.contains("\r\nConnection: close\r\n"));
    }

    #[test]
    fn a_right_token_is_told_about_a_malformed_upgrade() {
        let told = bad_request_response(&request("GET /x HTTP/1.1\nHost: a\n\n"), at(0));
        assert!(told.starts_with(b"HTTP/1.1 400 Bad Request\r\n"));
    }

    #[test]
    fn plain_http_is_sent_to_https() {
        let location = |head: &str| {
            let answer = String::from_utf8(redirect_response(&request(head), at(0))).unwrap();
            let line = answer
                .split("\r\n")
                .find_map(|line| line.strip_prefix("Location: "))
                .map(str::to_owned);
            assert_eq!(answer.starts_with("HTTP/1.1 301 "), line.is_some());
            assert!(answer.contains("\r\nConnection: close\r\n"));
            line
        };
        assert_eq!(
            location("GET /x?y HTTP/1.1\nHost: a\n\n").as_deref(),
            Some("https://a/x?y")
        );
        assert_eq!(
            location("GET / HTTP/1.1\nHost: a:80\n\n").as_deref(),
            Some("https://a/")
        );
        assert_eq!(
            location("GET / HTTP/1.1\nHost: [::1]:80\n\n").as_deref(),
            Some("https://[::1]/")
        );
        assert_eq!(
            location("GET / HTTP/1.1\nHost: [::1]\n\n").as_deref(),
            Some("https://[::1]/")
        );
        assert_eq!(location("GET / HTTP/1.0\n\n"), None);
        assert_eq!(location("OPTIONS * HTTP/1.1\nHost: a\n\n"), None);
    }

    #[test]
    fn dates_are_right_across_leap_years_and_centuries() {
        for (seconds, date) in [
            (0, "Thu, 01 Jan 1970 00:00:00 GMT"),
            (951_782_399, "Mon, 28 Feb 2000 23:59:59 GMT"),
            (951_782_400, "Tue, 29 Feb 2000 00:00:00 GMT"),
            (951_868_800, "Wed, 01 Mar 2000 00:00:00 GMT"),
            (1_709_164_800, "Thu, 29 Feb 2024 00:00:00 GMT"),
            (1_767_225_599, "Wed, 31 Dec 2025 23:59:59 GMT"),
            (1_767_225_600, "Thu, 01 Jan 2026 00:00:00 GMT"),
            (4_107_542_400, "Mon, 01 Mar 2100 00:00:00 GMT"),
        ] {
            assert_eq!(http_date(at(seconds)), date);
        }
        assert_eq!(
            http_date(UNIX_EPOCH - Duration::from_secs(9)),
            http_date(UNIX_EPOCH)
        );
    }

    #[test]
    fn every_day_follows_the_day_before() {
        let mut before = civil(0);
        for days in 1..200_000 {
            let today = civil(days);
            let (year, month, day) = before;
            let next = [
                (year, month, day + 1),
                (year, month + 1, 1),
                (year + 1, 0, 1),
            ];
            assert!(next.contains(&today), "{before:?} {today:?}");
            assert!(today.1 < 12 && (1..=31).contains(&today.2));
            before = today;
        }
    }
}
