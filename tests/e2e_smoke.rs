//! The lab's smoke set, which `ci/kernels` runs on other kernels, passes on this one, and can fail.

mod common;

use std::path::Path;

use common::RINGTUN;
use ringtun_lab::report::Report;
use ringtun_lab::smoke::smoke;

#[test]
fn the_smoke_set_passes() {
    let mut lines = Vec::new();
    let mut report = Report::new(&mut lines);
    smoke(Path::new(RINGTUN), &mut report, |_| ()).expect("a lab");
    let failed = report.failed();
    assert_eq!(failed, 0, "{}", String::from_utf8_lossy(&lines));
}

#[test]
fn the_smoke_set_notices_that_there_is_no_tunnel() {
    let mut lines = Vec::new();
    let mut report = Report::new(&mut lines);
    smoke(Path::new("false"), &mut report, |_| ()).expect("a lab");
    assert!(report.failed() > 0);
    let lines = String::from_utf8_lossy(&lines);
    assert!(lines.contains("FAIL  tunnel up"), "{lines}");
}
