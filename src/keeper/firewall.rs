//! What other firewalls on this host do to ringtun's traffic, judged from `nft -j list ruleset`. Pure.
//!
//! A packet that one base chain accepts goes on to the next, so an accept of ours does not help where another table
//! drops. Each base chain is therefore walked with a few packets that have to pass, through its jumps, in three-valued
//! logic: what a rule asks for is so, is not so, or cannot be told from here. What `iptables-nft` has set is seen as
//! well, but its extensions (`-m conntrack`, `-m multiport`) are opaque in the list: such a rule counts as one about
//! established connections, unless it says something about the tunnel or the port too.

use std::fmt;
use std::net::SocketAddr;

use serde_json::Value;

use super::ruleset::table_name;
use crate::invite::PORT_DEFAULT;

/// Chains that call each other, at most (NFT_JUMP_STACK_SIZE of the kernel).
const JUMPS_MAX: usize = 16;
/// Chains that are walked for one packet; after that nothing is certain.
const CHAINS_WALKED_MAX: usize = 4096;

/// An IP family, as a packet has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// What ringtun needs to get through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Traffic<'a> {
    /// What the server forwards between the tunnel and these interfaces.
    Forwarded {
        /// The tunnel's interface.
        tunnel: &'a str,
        /// The interfaces to the internet.
        egress: &'a [String],
    },
    /// New TCP connections to a port of this host.
    Listening {
        /// The tunnel's interface.
        tunnel: &'a str,
        /// The interfaces to the internet.
        egress: &'a [String],
        /// The port.
        port: u16,
    },
    /// A client's own connection to TCP 443, and what goes into the tunnel.
    Outgoing {
        /// The tunnel's interface.
        tunnel: &'a str,
        /// The interfaces to the internet.
        egress: &'a [String],
    },
}

/// A chain of somebody else that gets in the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocker {
    /// `FAMILY TABLE CHAIN`, as `nft` has it.
    pub chain: String,
    /// What it drops.
    pub drops: String,
    /// The family that is dropped, or the first of both.
    pub family: Family,
    /// Whether it is certain; otherwise it depends on what cannot be told from here.
    pub certain: bool,
    /// The port that is shut, if it is about one.
    pub port: Option<u16>,
    /// Shell commands that let it through.
    pub fix: String,
}

impl Blocker {
    /// What is wrong, without the fix.
    pub fn complaint(&self) -> String {
        let Blocker { chain, drops, .. } = self;
        let drop = if self.certain { "drops" } else { "may drop" };
        format!("another firewall ({chain}) {drop} {drops}")
    }
}

impl fmt::Display for Blocker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; let it through: {}", self.complaint(), self.fix)
    }
}

/// What stands in a server's way, in both directions: what it forwards and its ports.
pub fn on_server(
    ruleset_json: &str,
    tunnel: &str,
    egress: &[String],
    listen: &[SocketAddr],
) -> Vec<Blocker> {
    let mut found = blockers(ruleset_json, &Traffic::Forwarded { tunnel, egress });
    let mut ports: Vec<u16> = listen
        .iter()
        .filter(|address| !address.ip().is_loopback())
        .map(SocketAddr::port)
        .collect();
    ports.sort_unstable();
    ports.dedup();
    for port in ports {
        let traffic = Traffic::Listening {
            tunnel,
            egress,
            port,
        };
        found.extend(blockers(ruleset_json, &traffic));
    }
    found
}

/// Every base chain of other tables that drops some of `traffic`. What cannot be read gives none.
pub fn blockers(ruleset_json: &str, traffic: &Traffic<'_>) -> Vec<Blocker> {
    let Ok(ruleset) = serde_json::from_str::<Value>(ruleset_json) else {
        return Vec::new();
    };
    let none = Vec::new();
    let ruleset = Ruleset(ruleset["nftables"].as_array().unwrap_or(&none));
    let (hook, tunnel) = match traffic {
        Traffic::Forwarded { tunnel, .. } => ("forward", *tunnel),
        Traffic::Listening { tunnel, .. } => ("input", *tunnel),
        Traffic::Outgoing { tunnel, .. } => ("output", *tunnel),
    };
    let own = table_name(tunnel);
    ruleset
        .chains()
        .filter(|chain| text(chain, "hook") == hook && text(chain, "table") != own)
        .filter_map(|chain| {
            let (packet, outcome) = traffic
                .packets()
                .into_iter()
                .filter(|packet| packet.is_seen_by(text(chain, "family")))
                .map(|packet| {
                    let outcome = ruleset.outcome(chain, &packet);
                    (packet, outcome)
                })
                .filter(|(_, outcome)| *outcome != Outcome::Passes)
                // The first that is certain, or else the first.
                .min_by_key(|(_, outcome)| *outcome != Outcome::Dropped)?;
            Some(Blocker {
                chain: format!(
                    "{} {} {}",
                    text(chain, "family"),
                    text(chain, "table"),
                    text(chain, "name")
                ),
                drops: traffic.consequence(),
                family: packet.family,
                certain: outcome == Outcome::Dropped,
                port: match traffic {
                    Traffic::Listening { port, .. } => Some(*port),
                    _ => None,
                },
                fix: fix(&ruleset, chain, traffic),
            })
        })
        .collect()
}

/// What a chain does with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Passes,
    Dropped,
    Unclear,
}

/// Where a packet comes in or goes out.
#[derive(Clone, Copy, Debug)]
enum Side<'a> {
    Tunnel(&'a str),
    Internet(&'a [String]),
    /// It is made here, or is for this host.
    Here,
}

/// A TCP packet that has to pass.
#[derive(Clone, Copy, Debug)]
struct Packet<'a> {
    family: Family,
    inward: Side<'a>,
    outward: Side<'a>,
    is_established: bool,
    /// `None`: to any port, so that a rule about one port is not about it.
    port: Option<u16>,
}

impl Packet<'_> {
    fn is_seen_by(&self, family: &str) -> bool {
        match self.family {
            Family::V4 => matches!(family, "ip" | "inet"),
            Family::V6 => matches!(family, "ip6" | "inet"),
        }
    }
}

impl<'a> Traffic<'a> {
    fn packets(&self) -> Vec<Packet<'a>> {
        let packets = match *self {
            Traffic::Forwarded { tunnel, egress } => {
                let (tunnel, internet) = (Side::Tunnel(tunnel), Side::Internet(egress));
                vec![
                    (tunnel, internet, false, None),
                    (internet, tunnel, true, None),
                ]
            }
            Traffic::Listening { egress, port, .. } => {
                vec![(Side::Internet(egress), Side::Here, false, Some(port))]
            }
            Traffic::Outgoing { tunnel, egress } => vec![
                (
                    Side::Here,
                    Side::Internet(egress),
                    false,
                    Some(PORT_DEFAULT),
                ),
                (Side::Here, Side::Tunnel(tunnel), false, None),
            ],
        };
        [Family::V4, Family::V6]
            .into_iter()
            .flat_map(|family| {
                packets
                    .iter()
                    .map(move |&(inward, outward, is_established, port)| Packet {
                        family,
                        inward,
                        outward,
                        is_established,
                        port,
                    })
            })
            .collect()
    }

    fn consequence(&self) -> String {
        match self {
            Traffic::Forwarded { .. } => "forwarded packets, so clients get no internet".to_owned(),
            Traffic::Listening { port, .. } => {
                format!("connections to TCP port {port}, so clients do not get in")
            }
            Traffic::Outgoing { .. } => {
                "what leaves this host for the server or into the tunnel".to_owned()
            }
        }
    }
}

/// Whether a packet is what a rule asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Is {
    Yes,
    No,
    Unknown,
}

impl Is {
    fn of(known: bool) -> Self {
        if known { Is::Yes } else { Is::No }
    }

    fn not(self) -> Self {
        match self {
            Is::Yes => Is::No,
            Is::No => Is::Yes,
            Is::Unknown => Is::Unknown,
        }
    }
}

/// Where a walk through a chain ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Accept,
    Drop,
    /// Behind the last rule, or at a `return`.
    Fallen,
}

/// What was met on the way.
#[derive(Clone, Copy, Debug, Default)]
struct Way {
    /// Something that accepts, perhaps. What drops, perhaps, is not kept: everybody has a list of bad addresses.
    may_accept: bool,
    chains: usize,
}

struct Ruleset<'a>(&'a [Value]);

/// The members of a chain or rule, where they are text.
fn text<'a>(object: &'a Value, key: &str) -> &'a str {
    object[key].as_str().unwrap_or("?")
}

impl Ruleset<'_> {
    fn chains(&self) -> impl Iterator<Item = &Value> {
        self.0.iter().filter_map(|object| object.get("chain"))
    }

    fn has_chain(&self, family: &str, name: &str) -> bool {
        self.chains()
            .any(|chain| text(chain, "family") == family && text(chain, "name") == name)
    }

    fn outcome(&self, base: &Value, packet: &Packet<'_>) -> Outcome {
        let mut way = Way::default();
        let is_dropped = match self.walk(base, text(base, "name"), packet, &mut way, 0) {
            End::Fallen => base["policy"] == "drop",
            End::Drop => true,
            End::Accept => false,
        };
        match (is_dropped, way.may_accept) {
            (false, _) => Outcome::Passes,
            (true, false) => Outcome::Dropped,
            (true, true) => Outcome::Unclear,
        }
    }

    /// Walks the chain `name` of the table of `base`.
    fn walk(
        &self,
        base: &Value,
        name: &str,
        packet: &Packet<'_>,
        way: &mut Way,
        depth: usize,
    ) -> End {
        way.chains += 1;
        if way.chains > CHAINS_WALKED_MAX {
            way.may_accept = true;
            return End::Fallen;
        }
        let rules = self.0.iter().filter_map(|object| object.get("rule"));
        let rules = rules.filter(|rule| {
            rule["family"] == base["family"]
                && rule["table"] == base["table"]
                && rule["chain"] == name
        });
        for rule in rules {
            let none = Vec::new();
            let mut applies = Applies::default();
            for statement in rule["expr"].as_array().unwrap_or(&none) {
                if !applies.narrow(statement, packet) {
                    break;
                }
                for (verdict, is) in verdicts(statement, packet) {
                    let is = if is == Is::Yes { applies.is() } else { is };
                    match self.follow(base, verdict, is, packet, way, depth) {
                        Some(end) if is == Is::Yes => return end,
                        Some(End::Accept) => way.may_accept = true,
                        _ => {}
                    }
                }
            }
        }
        End::Fallen
    }

    /// Where a verdict leads; `None`: to the next rule.
    fn follow(
        &self,
        base: &Value,
        verdict: &Value,
        is: Is,
        packet: &Packet<'_>,
        way: &mut Way,
        depth: usize,
    ) -> Option<End> {
        let has = |name: &str| verdict.get(name).is_some();
        if is == Is::No {
            return None;
        }
        if has("accept") || has("queue") {
            return Some(End::Accept);
        }
        if has("drop") || has("reject") {
            return Some(End::Drop);
        }
        if has("return") {
            return Some(End::Fallen);
        }
        let (target, is_goto) = match (verdict.get("jump"), verdict.get("goto")) {
            (Some(jump), _) => (jump["target"].as_str()?, false),
            (_, Some(goto)) => (goto["target"].as_str()?, true),
            _ => return None,
        };
        if depth >= JUMPS_MAX {
            return None;
        }
        match self.walk(base, target, packet, way, depth + 1) {
            End::Fallen if !is_goto => None,
            end => Some(end),
        }
    }
}

/// Whether a rule applies, as far as its statements have been read.
#[derive(Default)]
struct Applies {
    has_unknown: bool,
    has_opaque: bool,
    /// It asks for the tunnel's interface, the port or TCP, and that is so.
    is_about_us: bool,
}

impl Applies {
    /// Takes one statement into account. `false`: the rule does not apply.
    fn narrow(&mut self, statement: &Value, packet: &Packet<'_>) -> bool {
        if let Some(condition) = statement.get("match") {
            let left = &condition["left"];
            let op = text(condition, "op");
            match compare(left, op, &condition["right"], packet) {
                Is::No => return false,
                Is::Unknown => self.has_unknown = true,
                Is::Yes => self.is_about_us |= is_specific(left) && op != "!=",
            }
        } else if statement.get("limit").is_some() {
            self.has_unknown = true;
        } else if statement.get("xt").is_some() {
            self.has_opaque = true;
            // The next statement may be the verdict: an extension without a verdict is a match.
            if !self.is_about_us && !packet.is_established {
                return false;
            }
            self.has_unknown |= !packet.is_established;
        }
        true
    }

    fn is(&self) -> Is {
        if self.has_unknown {
            Is::Unknown
        } else {
            Is::Yes
        }
    }
}

/// The verdicts in a statement, each with whether it is reached by a packet to which the rule applies.
fn verdicts<'v>(statement: &'v Value, packet: &Packet<'_>) -> Vec<(&'v Value, Is)> {
    let Some(map) = statement.get("vmap") else {
        return vec![(statement, Is::Yes)];
    };
    let Some(entries) = map["data"]["set"].as_array() else {
        return Vec::new();
    };
    entries
        .iter()
        .map(|entry| (&entry[1], compare(&map["key"], "==", &entry[0], packet)))
        .collect()
}

fn is_specific(left: &Value) -> bool {
    left["meta"]["key"] == "iifname"
        || left["meta"]["key"] == "oifname"
        || left["meta"]["key"] == "l4proto"
        || left["payload"]["field"] == "dport"
        || left["payload"]["field"] == "protocol"
}

/// Whether `left op right` is so for the packet.
fn compare(left: &Value, op: &str, right: &Value, packet: &Packet<'_>) -> Is {
    let is = match (left["meta"]["key"].as_str(), left["ct"]["key"].as_str()) {
        (Some("iifname" | "iif"), _) => on_side(packet.inward, right),
        (Some("oifname" | "oif"), _) => on_side(packet.outward, right),
        (Some("l4proto"), _) => any(right, &|value| Is::of(value == "tcp")),
        (Some("nfproto" | "protocol"), _) => any(right, &|value| {
            Is::of(match packet.family {
                Family::V4 => value == "ipv4" || value == "ip",
                Family::V6 => value == "ipv6" || value == "ip6",
            })
        }),
        (_, Some("state")) => any(right, &|value| {
            Is::of(
                value
                    == if packet.is_established {
                        "established"
                    } else {
                        "new"
                    },
            )
        }),
        // Nothing here is sent on to another address.
        (_, Some("status")) if right == "dnat" => Is::No,
        _ => of_payload(&left["payload"], right, packet),
    };
    match op {
        "==" | "in" => is,
        "!=" => is.not(),
        _ => Is::Unknown,
    }
}

fn of_payload(payload: &Value, right: &Value, packet: &Packet<'_>) -> Is {
    match (text(payload, "protocol"), text(payload, "field")) {
        ("udp" | "icmp" | "icmpv6" | "sctp" | "dccp" | "udplite", _) => Is::No,
        ("tcp" | "th", "dport") => match packet.port {
            Some(port) => any(right, &|value| holds_port(value, port)),
            None => Is::No,
        },
        ("ip", _) if packet.family == Family::V6 => Is::No,
        ("ip6", _) if packet.family == Family::V4 => Is::No,
        ("ip", "protocol") | ("ip6", "nexthdr") => any(right, &|value| Is::of(value == "tcp")),
        _ => Is::Unknown,
    }
}

fn holds_port(value: &Value, port: u16) -> Is {
    let port = u64::from(port);
    match (value.as_u64(), value["range"].as_array()) {
        (Some(value), _) => Is::of(value == port),
        (_, Some(range)) => match (
            range.first().and_then(Value::as_u64),
            range.get(1).and_then(Value::as_u64),
        ) {
            (Some(first), Some(last)) => Is::of((first..=last).contains(&port)),
            _ => Is::Unknown,
        },
        _ => Is::Unknown,
    }
}

fn on_side(side: Side<'_>, right: &Value) -> Is {
    let is_named = |name: &str| {
        any(right, &|value| match value.as_str() {
            Some(pattern) => Is::of(match pattern.strip_suffix('*') {
                Some(prefix) => name.starts_with(prefix),
                None => name == pattern,
            }),
            None => Is::Unknown,
        })
    };
    match side {
        Side::Here => Is::No,
        Side::Tunnel(name) => is_named(name),
        Side::Internet([]) => Is::Unknown,
        Side::Internet(names) => {
            let mut all = names.iter().map(|name| is_named(name));
            let first = all.next().unwrap_or(Is::Unknown);
            if all.all(|is| is == first) {
                first
            } else {
                Is::Unknown
            }
        }
    }
}

/// Whether it is so for one of the values of a set, a list or a single one. A named set cannot be looked into.
fn any(right: &Value, is: &dyn Fn(&Value) -> Is) -> Is {
    let values = right["set"].as_array().or(right.as_array());
    let Some(values) = values else {
        let is_named_set = right.as_str().is_some_and(|name| name.starts_with('@'));
        return if is_named_set { Is::Unknown } else { is(right) };
    };
    let mut result = Is::No;
    for value in values {
        match is(value) {
            Is::Yes => return Is::Yes,
            Is::Unknown => result = Is::Unknown,
            Is::No => {}
        }
    }
    result
}

/// Commands in the words of whatever owns the chain.
fn fix(ruleset: &Ruleset<'_>, chain: &Value, traffic: &Traffic<'_>) -> String {
    let (family, table, name) = (
        text(chain, "family"),
        text(chain, "table"),
        text(chain, "name"),
    );
    let is_firewalld = table == "firewalld";
    let is_ufw = ["ufw-user-forward", "ufw6-user-forward"]
        .iter()
        .any(|chain| ruleset.has_chain(family, chain));
    // Tables of these names and chains are made by iptables-nft, which wants to hear of changes itself.
    let is_iptables = table == "filter" && matches!(name, "FORWARD" | "INPUT" | "OUTPUT");
    let iptables = if family == "ip6" {
        "ip6tables"
    } else {
        "iptables"
    };
    let commands = match traffic {
        Traffic::Forwarded { tunnel, .. } if is_firewalld => vec![trusted_zone(tunnel)],
        Traffic::Forwarded { tunnel, .. } if is_iptables && is_ufw => ["in", "out"]
            .map(|side| format!("ufw route allow {side} on {tunnel}"))
            .into(),
        Traffic::Forwarded { tunnel, .. } if is_iptables => {
            let user_chain = "DOCKER-USER";
            let chain = if ruleset.has_chain(family, user_chain) {
                user_chain
            } else {
                name
            };
            ["i", "o"]
                .map(|side| format!("{iptables} -I {chain} -{side} {tunnel} -j ACCEPT"))
                .into()
        }
        Traffic::Forwarded { tunnel, .. } => ["iifname", "oifname"]
            .map(|side| format!("nft insert rule {family} {table} {name} {side} {tunnel} accept"))
            .into(),
        Traffic::Listening { port, .. } if is_firewalld => {
            vec![format!("firewall-cmd --add-port={port}/tcp")]
        }
        Traffic::Listening { port, .. } if is_iptables && is_ufw => {
            vec![format!("ufw allow {port}/tcp")]
        }
        Traffic::Listening { port, .. } if is_iptables => {
            vec![format!(
                "{iptables} -I {name} -p tcp --dport {port} -j ACCEPT"
            )]
        }
        Traffic::Listening { port, .. } => vec![format!(
            "nft insert rule {family} {table} {name} tcp dport {port} accept"
        )],
        Traffic::Outgoing { tunnel, .. } if is_firewalld => vec![trusted_zone(tunnel)],
        Traffic::Outgoing { tunnel, .. } if is_iptables && is_ufw => vec![
            format!("ufw allow out {PORT_DEFAULT}/tcp"),
            format!("ufw allow out on {tunnel}"),
        ],
        Traffic::Outgoing { tunnel, .. } if is_iptables => vec![
            format!("{iptables} -I {name} -p tcp --dport {PORT_DEFAULT} -j ACCEPT"),
            format!("{iptables} -I {name} -o {tunnel} -j ACCEPT"),
        ],
        Traffic::Outgoing { tunnel, .. } => vec![
            format!("nft insert rule {family} {table} {name} tcp dport {PORT_DEFAULT} accept"),
            format!("nft insert rule {family} {table} {name} oifname {tunnel} accept"),
        ],
    };
    commands.join("; ")
}

fn trusted_zone(tunnel: &str) -> String {
    format!("firewall-cmd --zone=trusted --add-interface={tunnel}")
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const TUNNEL: &str = "rt1";
    const DROPPING: &str = r#"{"chain": {"family": "ip", "table": "filter", "name": "FORWARD", "type": "filter",
        "hook": "forward", "prio": 0, "policy": "drop"}}"#;

    fn list(objects: &[&str]) -> String {
        format!(
            r#"{{"nftables": [{{"metainfo": {{}}}}, {}]}}"#,
            objects.join(",")
        )
    }

    fn forwarded(objects: &[&str]) -> Vec<Blocker> {
        let egress = ["eth0".to_owned()];
        let traffic = Traffic::Forwarded {
            tunnel: TUNNEL,
            egress: &egress,
        };
        blockers(&list(objects), &traffic)
    }

    /// A rule of the chain that is in question.
    fn rule(chain: &str, statements: &str) -> String {
        format!(
            r#"{{"rule": {{"family": "ip", "table": "filter", "chain": "{chain}", "expr": [{statements}]}}}}"#
        )
    }

    fn meta(key: &str, op: &str, right: &str) -> String {
        format!(
            r#"{{"match": {{"op": "{op}", "left": {{"meta": {{"key": "{key}"}}}}, "right": {right}}}}}"#
        )
    }

    const ACCEPT: &str = r#"{"accept": null}"#;
    const ESTABLISHED: &str = r#"{"match": {"op": "in", "left": {"ct": {"key": "state"}},
        "right": ["established", "related"]}}"#;

    #[test]
    fn a_dropping_policy_is_told_with_the_fix_that_fits_its_owner() {
        let docker = r#"{"chain": {"family": "ip", "table": "filter", "name": "DOCKER-USER"}}"#;
        let ufw = r#"{"chain": {"family": "ip", "table": "filter", "name": "ufw-user-forward"}}"#;
        let fix = |objects: &[&str]| {
            let found = forwarded(objects);
            assert_eq!(found.len(), 1, "{found:?}");
            assert!(found[0].certain && found[0].family == Family::V4);
            assert!(found[0].to_string().ends_with(&found[0].fix));
            found[0].fix.clone()
        };
        assert_eq!(
            fix(&[DROPPING, docker]),
            "iptables -I DOCKER-USER -i rt1 -j ACCEPT; iptables -I DOCKER-USER -o rt1 -j ACCEPT"
        );
        assert_eq!(
            fix(&[DROPPING, ufw]),
            "ufw route allow in on rt1; ufw route allow out on rt1"
        );
        assert_eq!(
            fix(&[DROPPING]),
            "iptables -I FORWARD -i rt1 -j ACCEPT; iptables -I FORWARD -o rt1 -j ACCEPT"
        );
        assert_eq!(
            fix(&[&DROPPING.replace("filter\", \"name", "mine\", \"name")]),
            "nft insert rule ip mine FORWARD iifname rt1 accept; nft insert rule ip mine FORWARD oifname rt1 accept"
        );
        assert_eq!(
            fix(&[&DROPPING.replace("filter\", \"name", "firewalld\", \"name")]),
            "firewall-cmd --zone=trusted --add-interface=rt1"
        );
    }

    #[rstest]
    #[case::both_directions(&[&meta("iifname", "==", "\"rt1\""), ACCEPT], &[&meta("oifname", "==", "\"rt1\""), ACCEPT], None)]
    #[case::one_direction(&[&meta("iifname", "==", "\"rt1\""), ACCEPT], &[], Some(true))]
    #[case::replies_as_established(&[&meta("iifname", "==", "\"rt*\""), ACCEPT], &[ESTABLISHED, ACCEPT], None)]
    #[case::replies_by_an_extension(&[&meta("iifname", "==", "{\"set\": [\"a\", \"rt1\"]}"), ACCEPT], &["{\"xt\": null}", ACCEPT], None)]
    #[case::by_what_is_known_to_be_elsewhere(&[&meta("iifname", "!=", "\"eth0\""), ACCEPT], &[ESTABLISHED, ACCEPT], None)]
    #[case::another_interface(&[&meta("iifname", "==", "\"docker0\""), ACCEPT], &[ESTABLISHED, ACCEPT], Some(true))]
    #[case::one_port_is_not_the_internet(
        &["{\"match\": {\"op\": \"==\", \"left\": {\"payload\": {\"protocol\": \"tcp\", \"field\": \"dport\"}}, \"right\": 443}}", ACCEPT],
        &[ESTABLISHED, ACCEPT], Some(true))]
    #[case::an_address_cannot_be_judged(
        &["{\"match\": {\"op\": \"==\", \"left\": {\"payload\": {\"protocol\": \"ip\", \"field\": \"saddr\"}}, \"right\": \"10.87.0.0\"}}", ACCEPT],
        &[ESTABLISHED, ACCEPT], Some(false))]
    #[case::ping_is_not_enough(&[&meta("l4proto", "==", "{\"set\": [\"icmp\", \"ipv6-icmp\"]}"), ACCEPT], &[ESTABLISHED, ACCEPT], Some(true))]
    fn a_dropping_policy_may_have_exceptions(
        #[case] first: &[&str],
        #[case] second: &[&str],
        #[case] certain: Option<bool>,
    ) {
        let rules = [first, second].map(|statements| rule("FORWARD", &statements.join(",")));
        let found = forwarded(&[DROPPING, &rules[0], &rules[1]]);
        assert_eq!(
            found.first().map(|blocker| blocker.certain),
            certain,
            "{found:?}"
        );
    }

    #[test]
    fn jumps_returns_and_the_last_rule_are_followed() {
        let accepting = DROPPING.replace("drop", "accept");
        let reject = rule("FORWARD", r#"{"counter": {}}, {"reject": null}"#);
        let jump = rule("FORWARD", r#"{"jump": {"target": "MORE"}}"#);
        let back = rule("MORE", r#"{"return": null}"#);
        let all = rule("MORE", ACCEPT);
        let lost = rule("MORE", r#"{"drop": null}"#);
        let itself = rule("MORE", r#"{"jump": {"target": "MORE"}}"#);

        assert!(forwarded(&[&accepting]).is_empty());
        assert_eq!(forwarded(&[&accepting, &reject]).len(), 1);
        assert!(forwarded(&[DROPPING, &jump, &all]).is_empty());
        assert_eq!(forwarded(&[DROPPING, &jump, &back, &all]).len(), 1);
        assert_eq!(forwarded(&[&accepting, &jump, &lost]).len(), 1);
        assert!(
            forwarded(&[&accepting, &jump, &itself]).is_empty(),
            "and it ends"
        );
    }

    #[test]
    fn a_list_of_bad_addresses_is_not_in_the_way() {
        let accepting = DROPPING.replace("drop", "accept");
        let bad = r#"{"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}}, "right": "@bad"}}"#;
        let bad = rule("FORWARD", &format!(r#"{bad}, {{"drop": null}}"#));
        assert!(forwarded(&[&accepting, &bad]).is_empty());
    }

    #[test]
    fn verdict_maps_are_looked_up() {
        let map = |entries: &str| {
            rule(
                "FORWARD",
                &format!(
                    r#"{{"vmap": {{"key": {{"ct": {{"key": "state"}}}}, "data": {{"set": [{entries}]}}}}}}"#
                ),
            )
        };
        let established = map(r#"["established", {"accept": null}], ["invalid", {"drop": null}]"#);
        let new_too = map(r#"["established", {"accept": null}], ["new", {"accept": null}]"#);
        assert_eq!(forwarded(&[DROPPING, &established]).len(), 1);
        assert!(forwarded(&[DROPPING, &new_too]).is_empty());
    }

    #[test]
    fn ports_are_found_in_sets_and_ranges() {
        let input = DROPPING
            .replace("FORWARD", "INPUT")
            .replace("forward", "input");
        let egress = ["eth0".to_owned()];
        let dropped = |port: u16, rules: &[&str]| {
            let mut objects = vec![input.as_str()];
            objects.extend(rules);
            let traffic = Traffic::Listening {
                tunnel: TUNNEL,
                egress: &egress,
                port,
            };
            blockers(&list(&objects), &traffic)
        };
        let ports = |ports: &str| {
            rule(
                "INPUT",
                &format!(
                    r#"{{"match": {{"op": "==", "left": {{"payload": {{"protocol": "tcp", "field": "dport"}}}},
                    "right": {ports}}}}}, {ACCEPT}"#
                ),
            )
        };
        let found = dropped(443, &[]);
        assert_eq!(
            found[0].fix,
            "iptables -I INPUT -p tcp --dport 443 -j ACCEPT"
        );
        assert!(dropped(443, &[&ports("443")]).is_empty());
        assert!(dropped(443, &[&ports(r#"{"set": [22, {"range": [400, 500]}]}"#)]).is_empty());
        assert!(dropped(443, &[&ports("22")])[0].certain);
        assert!(!dropped(443, &[&ports("\"@open\"")])[0].certain);
        let loopback = rule(
            "INPUT",
            &format!("{}, {ACCEPT}", meta("iifname", "==", "\"lo\"")),
        );
        assert!(dropped(443, &[&loopback])[0].certain);
    }

    #[test]
    fn a_client_has_to_reach_its_server_and_the_tunnel() {
        let output = DROPPING
            .replace("FORWARD", "OUTPUT")
            .replace("forward", "output");
        let egress = ["eth0".to_owned()];
        let traffic = Traffic::Outgoing {
            tunnel: TUNNEL,
            egress: &egress,
        };
        let found = blockers(&list(&[&output]), &traffic);
        assert!(found[0].certain);
        let web = rule(
            "OUTPUT",
            &format!("{}, {ACCEPT}", meta("oifname", "==", "\"eth0\"")),
        );
        assert_eq!(blockers(&list(&[&output, &web]), &traffic).len(), 1);
        let tunnel = rule(
            "OUTPUT",
            &format!("{}, {ACCEPT}", meta("oifname", "==", "\"rt1\"")),
        );
        assert!(blockers(&list(&[&output, &web, &tunnel]), &traffic).is_empty());
    }

    #[test]
    fn other_hooks_families_and_our_own_table_do_not_matter() {
        let bridge = DROPPING.replace("\"ip\"", "\"bridge\"");
        let input = DROPPING.replace("forward", "input");
        let own = DROPPING.replace("\"filter\", \"name\"", "\"ringtun-rt1\", \"name\"");
        assert!(forwarded(&[&bridge, &input, &own]).is_empty());
        let v6 = DROPPING.replace("\"ip\"", "\"ip6\"");
        let found = forwarded(&[&v6]);
        assert_eq!(found[0].family, Family::V6);
        assert!(found[0].fix.starts_with("ip6tables -I FORWARD"));
        let traffic = Traffic::Forwarded {
            tunnel: TUNNEL,
            egress: &[],
        };
        assert!(blockers("not JSON", &traffic).is_empty());
    }
}
