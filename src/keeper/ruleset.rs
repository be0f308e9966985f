//! The server's nftables table as text. Pure.

use std::fmt::Write;
use std::net::IpAddr;

use super::plan::Tunnel;
use crate::config::INTERFACE;
use ipnet::{Ipv4Net, Ipv6Net};

/// Ports below belong to services.
const NAT_PORT_MIN: u16 = 1024;
const NAT_PORT_MAX: u16 = u16::MAX;
const IPV4_TCP_HEADER_BYTES: u32 = 40;
const IPV6_TCP_HEADER_BYTES: u32 = 60;

/// How long connections to the listeners are tracked in each state, s. What answers at all answers
/// within a few; an established one has a keepalive far more often, and is taken up again otherwise.
const TIMEOUTS_S: [(&str, u32); 8] = [
    ("syn_sent", 10),
    ("syn_recv", 10),
    ("established", 600),
    ("fin_wait", 10),
    ("close_wait", 10),
    ("last_ack", 10),
    ("time_wait", 1),
    ("close", 1),
];

/// What the server's rules depend on.
#[derive(Clone, Debug)]
pub struct ServerRules<'a> {
    /// The tunnel's interface.
    pub tunnel: &'a Tunnel,
    /// Inner IPv4 addresses.
    pub pool_v4: Ipv4Net,
    /// Inner IPv6 addresses.
    pub pool_v6: Ipv6Net,
    /// The server's own inner addresses.
    pub own: [IpAddr; 2],
    /// Whether peers may reach each other.
    pub client_to_client: bool,
    /// The smallest MTU among the interfaces to the internet, bytes.
    pub egress_mtu: Option<u32>,
    /// Ports that the server listens on.
    pub listen_ports: Vec<u16>,
}

/// The name of the table that belongs to an interface.
pub fn table_name(interface: &str) -> String {
    if interface == INTERFACE {
        "ringtun".into()
    } else {
        format!("ringtun-{interface}")
    }
}

/// The table, as `nft -f` takes it: it replaces the one that may be there, all at once.
pub fn ruleset(rules: &ServerRules<'_>) -> String {
    let timeouts = timeouts(&rules.listen_ports);
    table(rules, &timeouts)
}

/// The same for a kernel without CONFIG_NF_CONNTRACK_TIMEOUT.
pub fn ruleset_without_timeouts(rules: &ServerRules<'_>) -> String {
    table(rules, "")
}

fn table(rules: &ServerRules<'_>, timeouts: &str) -> String {
    let name = table_name(&rules.tunnel.name);
    let mut text = format!("table inet {name}\ndelete table inet {name}\ntable inet {name} {{\n");
    text.push_str(timeouts);
    text.push_str(&chain(
        "prerouting",
        "type filter hook prerouting priority raw",
        &source_rules(rules),
    ));
    text.push_str(&chain(
        "forward",
        "type filter hook forward priority filter",
        &forward_rules(rules),
    ));
    text.push_str(&chain(
        "postrouting",
        "type nat hook postrouting priority srcnat",
        &nat_rules(rules),
    ));
    text.push_str("}\n");
    text
}

fn chain(name: &str, hook: &str, rules: &[String]) -> String {
    let mut text = format!("\tchain {name} {{\n\t\t{hook}; policy accept;\n");
    for rule in rules {
        let _ = writeln!(text, "\t\t{rule}");
    }
    text.push_str("\t}\n");
    text
}

/// Has connection tracking forget connections to the listeners soon after their end.
///
/// They are tracked because the peers' connections are. The kernel keeps one that has ended for up
/// to 120 s, and 262,144 at most: strangers who connect 6,000 times a second would fill that in 44 s,
/// and no peer could open a connection through the tunnel any more. They are not exempted from
/// tracking, since many a firewall accepts new connections only (`ct state new tcp dport 443`).
fn timeouts(listen_ports: &[u16]) -> String {
    let ports: Vec<String> = listen_ports.iter().map(u16::to_string).collect();
    if ports.is_empty() {
        return String::new();
    }
    let states: Vec<String> = TIMEOUTS_S
        .iter()
        .map(|(state, seconds)| format!("{state}: {seconds}"))
        .collect();
    let mut text = String::new();
    let mut rules = Vec::new();
    for (family, protocol) in [("ipv4", "ip"), ("ipv6", "ip6")] {
        let _ = write!(
            text,
            "\tct timeout outer-{family} {{\n\t\tprotocol tcp\n\t\tl3proto {protocol}\n\t\tpolicy = {{ {} }}\n\t}}\n",
            states.join(", ")
        );
        rules.push(format!(
            r#"meta nfproto {family} tcp dport {{ {} }} fib daddr type local ct timeout set "outer-{family}""#,
            ports.join(", ")
        ));
    }
    let hook = "type filter hook prerouting priority filter";
    text + &chain("outer", hook, &rules)
}

/// Out of the tunnel come pool addresses only, and the server's inner addresses are reached through it only.
fn source_rules(rules: &ServerRules<'_>) -> Vec<String> {
    let tunnel = &rules.tunnel.name;
    let [own_v4, own_v6] = rules.own;
    vec![
        format!(r#"iifname "{tunnel}" ip saddr != {} drop"#, rules.pool_v4),
        format!(r#"iifname "{tunnel}" ip6 saddr != {} drop"#, rules.pool_v6),
        format!(r#"iifname != {{ "{tunnel}", "lo" }} ip daddr {own_v4} drop"#),
        format!(r#"iifname != {{ "{tunnel}", "lo" }} ip6 daddr {own_v6} drop"#),
    ]
}

/// Peers do not reach each other unless that is wanted, and nobody reaches a peer that has not asked first.
fn forward_rules(rules: &ServerRules<'_>) -> Vec<String> {
    let tunnel = &rules.tunnel.name;
    let among_peers = if rules.client_to_client {
        "accept"
    } else {
        "drop"
    };
    let mut lines = vec![
        format!(r#"iifname "{tunnel}" oifname "{tunnel}" {among_peers}"#),
        format!(r#"oifname "{tunnel}" ct state != {{ established, related }} drop"#),
        // What is not tracked is not translated either, and would leave with the peer's inner address.
        format!(r#"iifname "{tunnel}" ct state invalid drop"#),
        // Where else should it go while the tunnel's interface is not there?
        format!(r#"oifname != "{tunnel}" ip daddr {} drop"#, rules.pool_v4),
        format!(r#"oifname != "{tunnel}" ip6 daddr {} drop"#, rules.pool_v6),
    ];
    if let Some(mtu) = rules.egress_mtu
        && mtu < u32::from(rules.tunnel.mtu)
    {
        for (family, header_bytes) in [
            ("ipv4", IPV4_TCP_HEADER_BYTES),
            ("ipv6", IPV6_TCP_HEADER_BYTES),
        ] {
            let mss = mtu.saturating_sub(header_bytes);
            for direction in ["iifname", "oifname"] {
                lines.push(format!(
                    r#"{direction} "{tunnel}" meta nfproto {family} tcp flags & (syn | rst) == syn tcp option maxseg size > {mss} tcp option maxseg size set {mss}"#
                ));
            }
        }
    }
    lines
}

/// The pool leaves by the address of whatever interface it leaves by.
fn nat_rules(rules: &ServerRules<'_>) -> Vec<String> {
    let tunnel = &rules.tunnel.name;
    let (first, last) = nat_ports(&rules.listen_ports);
    let pools = [
        format!("ip saddr {}", rules.pool_v4),
        format!("ip6 saddr {}", rules.pool_v6),
    ];
    pools
        .iter()
        .flat_map(|pool| {
            let from = format!(r#"{pool} oifname != "{tunnel}""#);
            [
                format!("{from} meta l4proto {{ tcp, udp }} masquerade to :{first}-{last}"),
                format!("{from} masquerade"),
            ]
        })
        .collect()
}

/// The largest range of ports without a listener: a translated connection must never sit on one (CVE-2021-3773).
fn nat_ports(listen_ports: &[u16]) -> (u16, u16) {
    let mut taken: Vec<u16> = listen_ports
        .iter()
        .copied()
        .filter(|port| *port >= NAT_PORT_MIN)
        .collect();
    taken.sort_unstable();
    let mut best = (0, (NAT_PORT_MIN, NAT_PORT_MAX));
    let mut first = u32::from(NAT_PORT_MIN);
    let end = u32::from(NAT_PORT_MAX) + 1;
    for port in taken.into_iter().map(u32::from).chain([end]) {
        if port > first && port - first > best.0 {
            best = (port - first, (first as u16, (port - 1) as u16));
        }
        first = port + 1;
    }
    best.1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn translated_ports_avoid_every_listener() {
        assert_eq!(nat_ports(&[443, 80]), (1024, 65535));
        assert_eq!(nat_ports(&[8443]), (8444, 65535));
        assert_eq!(nat_ports(&[60000]), (1024, 59999));
        assert_eq!(nat_ports(&[65535, 1024, 1024]), (1025, 65534));
        assert_eq!(nat_ports(&[20000, 50000]), (20001, 49999));
    }

    #[test]
    fn only_the_first_interface_has_the_short_name() {
        assert_eq!(table_name("ringtun0"), "ringtun");
        assert_eq!(table_name("rt1"), "ringtun-rt1");
    }

    #[test]
    fn ended_connections_to_listeners_are_forgotten() {
        let text = timeouts(&[443, 80]);
        for family in ["ipv4", "ipv6"] {
            let rule =
                format!("meta nfproto {family} tcp dport {{ 443, 80 }} fib daddr type local");
            assert!(text.contains(&rule), "{text}");
        }
        assert_eq!(text.matches("time_wait: 1,").count(), 2);
        assert_eq!(timeouts(&[]), "");
    }

    fn rules(tunnel: &Tunnel, egress_mtu: u32) -> String {
        ruleset(&ServerRules {
            tunnel,
            pool_v4: "10.87.0.0/16".parse().expect("pool"),
            pool_v6: "fd01::/64".parse().expect("pool"),
            own: ["10.87.0.1", "fd01::1"].map(|address| address.parse().expect("address")),
            client_to_client: false,
            egress_mtu: Some(egress_mtu),
            listen_ports: vec![443],
        })
    }

    #[test]
    fn segments_are_clamped_only_below_a_smaller_mtu() {
        let tunnel = Tunnel {
            name: "ringtun0".into(),
            index: 7,
            mtu: 1500,
        };
        assert!(!rules(&tunnel, 1500).contains("maxseg"));
        assert!(!rules(&tunnel, 9000).contains("maxseg"));
        let clamped = rules(&tunnel, 1400);
        assert!(clamped.contains("set 1360") && clamped.contains("set 1340"));
    }
}
