//! All of a host's network configuration as text, to be compared before and after.

use std::fmt::Write;

use ringtun_lab::Host;

use super::until_true;

/// What is looked at. Counters, clocks and lists of loaded modules are no state, and are left out or blotted out.
const LOOKS: [&str; 9] = [
    "ip -d link",
    "ip address show",
    "ip route show table all",
    "ip -6 route show table all",
    "ip rule; ip -6 rule",
    "nft list ruleset",
    "stat -c '%F %a %u:%g' /etc/resolv.conf; readlink /etc/resolv.conf; cat /etc/resolv.conf",
    "ls -A /run/ringtun 2>/dev/null",
    "grep -rs . /proc/sys/net --exclude=nf_conntrack_count --exclude=tcp_allowed_congestion_control \
     --exclude=tcp_available_congestion_control | sort",
];
/// Words before a number of seconds that goes down by itself.
const CLOCKS: [&str; 3] = ["expires", "valid_lft", "preferred_lft"];

/// A host's network configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostState(Vec<String>);

impl HostState {
    pub fn of(host: &Host) -> HostState {
        wait_until_settled(host);
        let looks = LOOKS.map(|look| {
            let output = host.run("sh", ["-c", look]).expect("sh");
            without_clocks(&output.text())
        });
        assert!(
            looks[0].contains("lo:") && looks[8].lines().count() > 100,
            "the host shows what it has"
        );
        HostState(looks.to_vec())
    }

    /// Fails with the differences, if there are any.
    pub fn assert_same(&self, now: &HostState, when: &str) {
        let mut differences = String::new();
        for (look, (before, now)) in LOOKS.iter().zip(self.0.iter().zip(&now.0)) {
            if before != now {
                let _ = writeln!(differences, "# {look}\n{}", difference(before, now));
            }
        }
        assert!(
            differences.is_empty(),
            "{when}, not as before:\n{differences}"
        );
    }
}

/// Waits for what the kernel does on its own after a link was set up.
pub fn wait_until_settled(host: &Host) {
    until_true("links that have settled", || host.is_settled().expect("ip"));
}

fn without_clocks(text: &str) -> String {
    let lines = text.lines().map(|line| {
        let mut after_clock = false;
        let words = line.split(' ').map(|word| {
            let is_time = after_clock && word.ends_with("sec");
            after_clock = CLOCKS.contains(&word);
            if is_time { "(time)" } else { word }
        });
        words.collect::<Vec<_>>().join(" ") + "\n"
    });
    lines.collect()
}

fn difference(before: &str, now: &str) -> String {
    let only = |one: &str, other: &str, mark: &str| -> String {
        let lines = one
            .lines()
            .filter(|line| !other.lines().any(|same| same == *line));
        lines.map(|line| format!("{mark} {line}\n")).collect()
    };
    let lines = only(before, now, "-") + &only(now, before, "+");
    if lines.is_empty() {
        "the same lines in another order".to_owned()
    } else {
        lines
    }
}
