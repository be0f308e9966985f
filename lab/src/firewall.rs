//! What the lab's firewall lets through: nftables rulesets as text, and their application.
//!
//! Both families are masqueraded: the LAN's addresses are private in IPv4 and in IPv6, so that the internet
//! side needs no route back and sees the firewall's own address.

use crate::host::Host;
use crate::process::ProcessError;

/// The interface towards the LAN.
pub const LAN: &str = "lan";
/// The interface towards the internet.
pub const WAN: &str = "wan";

/// Which traffic from the LAN gets out.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Policy {
    /// TCP to ports 80 and 443, whatever it carries.
    Ports,
    /// TCP to port 443 that starts as TLS, TCP to port 80 that starts as HTTP. Needs a kernel of 5.16 or
    /// newer, where nftables can look past a TCP header of any length.
    Inspection,
}

/// Loads the ruleset of `policy` into a host with interfaces [`LAN`] and [`WAN`].
///
/// # Errors
/// When `nft` is missing or refuses.
pub fn apply(firewall: &Host, policy: Policy) -> Result<(), ProcessError> {
    load(firewall, ruleset(policy))
}

fn load(firewall: &Host, ruleset: String) -> Result<(), ProcessError> {
    firewall
        .command("nft")
        .args(["-f", "-"])
        .input(ruleset)
        .exec()
        .map(drop)
}

/// The ruleset as text.
fn ruleset(policy: Policy) -> String {
    let (verdict, inspection) = match policy {
        Policy::Ports => ("accept", String::new()),
        Policy::Inspection => ("jump inspect", inspection()),
    };
    // Inspection has to see the packets of a connection until it knows it, established or not.
    let known = match policy {
        Policy::Ports => "ct state established,related accept",
        Policy::Inspection => "ct state related accept\n        ct state established jump inspect",
    };
    format!(
        r#"table inet lab {{
{inspection}    chain forward {{
        type filter hook forward priority filter; policy drop;
        ct state invalid drop
        {known}
        iifname "{LAN}" oifname "{WAN}" tcp dport {{ 80, 443 }} {verdict}
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        oifname "{WAN}" masquerade
    }}
}}
"#
    )
}

/// The first bytes that each side of a connection sends decide. Bit 0 of the connection's mark: the client's
/// were right; bit 1: the server's were, too.
///
/// `@ih` is the payload after the TCP header; a rule that reads more of it than there is does not match. So
/// packets without payload (SYN, ACK, FIN) fall through to the end and pass, and `@ih,0,8 >= 0`, put as two
/// rules, catches everything that has any.
fn inspection() -> String {
    // A TLS record (type 0x16 handshake, version 3.x) whose first message is a ClientHello or ServerHello.
    let tls = |hello: &str| format!("@ih,0,16 0x1603 @ih,40,8 {hello}");
    let methods = ["GET ", "HEAD", "POST", "PUT ", "OPTI", "DELE"].map(|method| {
        let [a, b, c, d] = method.as_bytes() else {
            unreachable!("four bytes each")
        };
        format!("0x{a:02x}{b:02x}{c:02x}{d:02x}")
    });
    format!(
        r#"    chain inspect {{
        ct direction original jump from_client
        ct direction reply jump from_server
    }}
    chain from_client {{
        ct mark and 1 == 1 accept
        tcp dport 443 {client_hello} ct mark set ct mark or 1 accept
        tcp dport 80 @ih,0,32 {{ {methods} }} ct mark set ct mark or 1 accept
        jump no_payload
    }}
    chain from_server {{
        ct mark and 2 == 2 accept
        ct mark and 1 == 1 tcp sport 443 {server_hello} ct mark set ct mark or 2 accept
        ct mark and 1 == 1 tcp sport 443 @ih,0,16 0x1503 ct mark set ct mark or 2 accept
        ct mark and 1 == 1 tcp sport 80 @ih,0,32 0x48545450 ct mark set ct mark or 2 accept
        jump no_payload
    }}
    chain no_payload {{
        @ih,0,8 0 drop
        @ih,0,8 != 0 drop
        accept
    }}
"#,
        client_hello = tls("0x01"),
        server_hello = tls("0x02"),
        methods = methods.join(", "),
    )
}
