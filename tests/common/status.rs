//! `ringtun status --json`, and where in it things are.

use ringtun_lab::Host;
use serde_json::Value;

use super::RINGTUN;

/// The document of the one instance on this host.
pub fn status(host: &Host) -> Value {
    let output = host.exec(RINGTUN, ["status", "--json"]).expect("status");
    let lines: Vec<&str> = output.lines().collect();
    assert_eq!(lines.len(), 1, "one document: {output}");
    serde_json::from_str(lines[0]).expect("JSON")
}

/// What people see.
pub fn status_text(host: &Host) -> String {
    host.exec(RINGTUN, ["status"]).expect("status")
}

/// A field that is an array.
pub fn list<'v>(value: &'v Value, field: &str) -> &'v Vec<Value> {
    value[field]
        .as_array()
        .unwrap_or_else(|| panic!("no list {field} in {value:#}"))
}

/// A number, by a JSON pointer.
pub fn number(value: &Value, pointer: &str) -> u64 {
    let found = value.pointer(pointer).and_then(Value::as_u64);
    found.unwrap_or_else(|| panic!("no number {pointer} in {value:#}"))
}

/// The connections of all sessions.
pub fn connections(status: &Value) -> Vec<&Value> {
    let sessions = list(status, "sessions").iter();
    sessions
        .flat_map(|session| list(session, "connections"))
        .collect()
}

/// Packets of the peer that were not let in.
pub fn turned_away(connection: &Value) -> u64 {
    let reasons = ["invalid", "spoofed", "unknown_context"];
    let counters = reasons.map(|reason| format!("/counters/dropped_{reason}"));
    counters
        .iter()
        .map(|counter| number(connection, counter))
        .sum()
}
