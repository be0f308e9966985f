//! What ringtun sets on a host is undone exactly, however it ends.
//!
//! Each test runs in network and mount namespaces of its own, in a child process: as root, or in a user namespace.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddrV6, UdpSocket};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use ringtun::keeper::apply::Changes;
use ringtun::keeper::plan::{self, ServerNetwork, Step, Tunnel};
use ringtun::keeper::request::TunnelSettings;
use ringtun::keeper::undo::Record;
use ringtun::sys::route::{Netlink, Way};
use ringtun::sys::tun::{self, Tun};
use socket2::{Domain, Protocol, Socket, Type};

const INSIDE: &str = "RINGTUN_TEST_INSIDE_NAMESPACE";
const TIMEOUT: Duration = Duration::from_secs(10);
const INTERFACE: &str = "ringtun0";
/// So many that a race is lost at least once.
const ADDRESSES: u32 = 500;

/// Runs `body` in fresh namespaces, with an empty `/run` and a resolv.conf of its own. `name` is the test's.
fn in_namespace(name: &str, body: fn()) {
    if std::env::var_os(INSIDE).is_some() {
        return body();
    }
    let is_root = nix::unistd::geteuid().is_root();
    let test = std::env::current_exe().expect("this test's binary");
    let output = Command::new("unshare")
        .args(if is_root {
            &[][..]
        } else {
            &["--map-root-user"]
        })
        .args(["--net", "--mount", "--fork", "--kill-child", "--"])
        .args(["sh", "-ec"])
        .arg(
            "mount -t tmpfs tmpfs /run && echo nameserver 192.0.2.53 > /run/resolv.conf \
             && mount --bind /run/resolv.conf /etc/resolv.conf && ip link set lo up && exec \"$@\"",
        )
        .arg("sh")
        .arg(test)
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(INSIDE, "1")
        .stdin(Stdio::null())
        .output()
        .expect("unshare(1) is installed");
    assert!(
        output.status.success(),
        "in a namespace (needs root, or user namespaces that are allowed):\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn run(command: &str) -> String {
    let output = Command::new("sh").args(["-ec", command]).output();
    let output = output.expect("a shell");
    assert!(
        output.status.success(),
        "{command}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Everything that ringtun might have left behind.
fn snapshot() -> String {
    run(
        "ip -d link; ip -d address show scope global | sed /valid_lft/d
         ip route show table all | sed 's/ expires [0-9]*sec//' | sort
         ip -6 route show table all | sed 's/ expires [0-9]*sec//' | sort
         ip rule; ip -6 rule; nft list ruleset; cat /etc/resolv.conf; stat -c '%A %U %G %s %N' /etc/resolv.conf
         ls -A /run | sed s/^/run:/
         cd /proc/sys/net; grep -rs . ipv4/conf ipv6/conf ipv4/ip_forward | sort",
    )
}

#[track_caller]
fn assert_same(before: &str, after: &str) {
    let changed: Vec<String> = before
        .lines()
        .filter(|line| !after.lines().any(|other| other == *line))
        .map(|line| format!("- {line}"))
        .chain(
            after
                .lines()
                .filter(|line| !before.lines().any(|other| other == *line))
                .map(|line| format!("+ {line}")),
        )
        .collect();
    assert_eq!(changed, Vec::<String>::new(), "the host has changed");
    assert_eq!(before.lines().count(), after.lines().count());
}

#[track_caller]
fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !condition() {
        assert!(Instant::now() < deadline, "timed out: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// An uplink with IPv4 and IPv6, and a second interface. The other ends are in the same namespace and stand for the network;
/// they are not to learn from it.
fn make_uplinks() {
    run("ip link add eth0 mtu 1400 type veth peer name net0
         ip link add eth1 type veth peer name net1
         for i in eth0 net0 eth1 net1; do ip link set $i up; done
         ip address add 192.0.2.10/24 dev eth0
         ip route add default via 192.0.2.1 dev eth0
         ip address add 10.1.0.1/24 dev eth1
         echo 1 > /proc/sys/net/ipv6/conf/eth1/forwarding
         echo 0 > /proc/sys/net/ipv6/conf/net0/accept_ra");
    wait_until("link-local addresses", || {
        !run("ip -6 address").contains("tentative")
    });
}

/// Advertises a default router and a prefix on the uplink until the kernel has learned both.
fn learn_ipv6() {
    const ROUTER_ADVERTISEMENT: [u8; 16] = [134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
    const PREFIX: [u8; 16] = [3, 4, 64, 0xc0, 0, 0, 14, 16, 0, 0, 7, 8, 0, 0, 0, 0];
    let mut message = ROUTER_ADVERTISEMENT.to_vec();
    message.extend(PREFIX);
    message.extend(
        "2001:db8:7::"
            .parse::<std::net::Ipv6Addr>()
            .expect("prefix")
            .octets(),
    );
    let index = nix::net::if_::if_nametoindex("net0").expect("net0");
    let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6)).expect("raw socket");
    socket.set_multicast_if_v6(index).expect("interface");
    socket.set_multicast_hops_v6(255).expect("hop limit");
    let all_nodes = SocketAddrV6::new("ff02::1".parse().expect("address"), 0, 0, index);
    wait_until("a route from a router advertisement", || {
        socket.send_to(&message, &all_nodes.into()).expect("sent");
        run("ip -6 route show default").contains("proto ra")
    });
    wait_until("an address from a router advertisement", || {
        let addresses = run("ip -6 address show dev eth0");
        addresses.contains("2001:db8:7:") && !addresses.contains("tentative")
    });
}

fn begin() -> (Changes, Tun, Tunnel) {
    let mut changes =
        Changes::start(Record::claim(INTERFACE).expect("claimed"), None).expect("started");
    changes.interface_is_coming(INTERFACE).expect("recorded");
    let tun = tun::create(INTERFACE, 1500, 2, true).expect("interface");
    let tunnel = Tunnel {
        name: INTERFACE.into(),
        index: nix::net::if_::if_nametoindex(INTERFACE).expect("index"),
        mtu: 1500,
    };
    (changes, tun, tunnel)
}

fn server_steps(changes: &Changes, tunnel: &Tunnel) -> Vec<Step> {
    let network = ServerNetwork {
        pool_v4: "10.87.0.0/16".parse().expect("pool"),
        pool_v6: "fd01::/64".parse().expect("pool"),
        listen: &["[::]:8443".parse().expect("address")],
        client_to_client: false,
    };
    plan::server(&changes.observe().expect("observed"), tunnel, &network)
}

#[test]
fn a_servers_changes_are_undone_exactly_and_keep_learned_routes() {
    in_namespace(
        "a_servers_changes_are_undone_exactly_and_keep_learned_routes",
        || {
            make_uplinks();
            learn_ipv6();
            let before = snapshot();
            let (mut changes, tun, tunnel) = begin();
            let steps = server_steps(&changes, &tunnel);
            changes.reach(&tunnel, &steps).expect("applied");

            let during = snapshot();
            for expected in [
                "ipv4/conf/eth0/forwarding:1",
                "ipv4/conf/ringtun0/forwarding:1",
                "ipv4/conf/eth1/forwarding:0",
                "ipv4/ip_forward:0",
                "ipv6/conf/all/forwarding:1",
                "ipv6/conf/eth0/accept_ra:2",
                "ipv6/conf/ringtun0/accept_ra:0",
                "table inet ringtun {",
                "10.87.0.0/16 dev ringtun0",
                "fd01::/64 dev ringtun0",
                "masquerade to :8444-65535",
                "maxseg size set 1360",
                "maxseg size set 1340",
                "proto ra",
            ] {
                assert!(during.contains(expected), "{expected} is not in\n{during}");
            }
            let link_local = run("ip -6 address show dev ringtun0 scope link");
            assert_eq!(link_local, "", "the tunnel talks by itself");

            // Advertisements still count, and what was learned meanwhile has to survive the way back too.
            run("ip -6 route del default");
            learn_ipv6();
            drop(tun);
            changes.undo_all().expect("undone");
            assert_same(&before, &snapshot());
            assert!(before.contains("proto ra"));
        },
    );
}

#[test]
fn the_interface_goes_even_while_a_queue_is_held_open() {
    in_namespace("the_interface_goes_even_while_a_queue_is_held_open", || {
        let before = snapshot();
        let (changes, tun, _) = begin();
        changes.undo_all().expect("undone");
        assert_same(&before, &snapshot());
        drop(tun);
    });
}

#[test]
fn changes_that_are_dropped_are_undone() {
    in_namespace("changes_that_are_dropped_are_undone", || {
        make_uplinks();
        let before = snapshot();
        let (mut changes, tun, tunnel) = begin();
        let steps = server_steps(&changes, &tunnel);
        changes.reach(&tunnel, &steps).expect("applied");
        drop(tun);
        drop(changes);
        assert_same(&before, &snapshot());
    });
}

fn client_settings() -> TunnelSettings {
    let net = |text: &str| text.parse::<IpNet>().expect("prefix");
    TunnelSettings {
        addresses: vec![net("10.87.0.2/32"), net("fd01::2/128")],
        routes: vec![net("0.0.0.0/0")],
        block_ipv6: true,
        dns: vec!["192.0.2.99".parse().expect("address")],
    }
}

fn configure(changes: &mut Changes, tunnel: &Tunnel, settings: &TunnelSettings) {
    let host = changes.observe().expect("observed");
    let steps = plan::client(&host, tunnel, settings).expect("planned");
    changes.reach(tunnel, &steps).expect("applied");
}

#[test]
fn a_clients_changes_follow_the_settings_and_are_undone_exactly() {
    in_namespace(
        "a_clients_changes_follow_the_settings_and_are_undone_exactly",
        || {
            make_uplinks();
            learn_ipv6();
            let before = snapshot();
            let (mut changes, tun, tunnel) = begin();
            configure(&mut changes, &tunnel, &client_settings());

            let web: &str = "ip route get 203.0.113.80";
            assert!(run(web).contains("dev ringtun0"), "{}", run(web));
            let error = Command::new("ip")
                .args(["route", "get", "2001:db8::1"])
                .output();
            assert!(!error.expect("ip").status.success(), "IPv6 is blocked");
            assert!(run("cat /etc/resolv.conf").contains("nameserver 192.0.2.99"));

            // The outer connection stays outside, over both families.
            for (server, expected) in [
                ("198.51.100.10", "via 192.0.2.1"),
                ("2001:db8::9", "dev eth0"),
            ] {
                let server: IpAddr = server.parse().expect("address");
                let host = changes.observe().expect("observed");
                let route = plan::exception(&host, &tunnel, server)
                    .expect("a way")
                    .expect("needed");
                assert!(matches!(
                    route.way,
                    Way::Interface {
                        gateway: Some(_),
                        ..
                    }
                ));
                changes.add_route(&route).expect("added");
                // The default router may have moved since.
                changes.change_route(&route).expect("changed");
                let found = run(&format!("ip route get {server}"));
                assert!(
                    found.contains(expected) && found.contains("dev eth0"),
                    "{found}"
                );
            }

            // New settings: what is no longer wanted goes, the rest stays.
            let carried = TunnelSettings {
                addresses: vec![
                    "10.87.0.3/32".parse().expect("prefix"),
                    "fd01::2/128".parse().expect("prefix"),
                ],
                routes: vec![
                    "0.0.0.0/0".parse().expect("prefix"),
                    "::/0".parse().expect("prefix"),
                ],
                block_ipv6: false,
                dns: vec![],
            };
            configure(&mut changes, &tunnel, &carried);
            configure(&mut changes, &tunnel, &carried);
            let addresses = run("ip address show dev ringtun0");
            assert!(
                !addresses.contains("10.87.0.2/") && addresses.contains("10.87.0.3/32"),
                "{addresses}"
            );
            assert!(run("ip route get 2001:db8::1").contains("dev ringtun0"));
            assert!(run("cat /etc/resolv.conf").contains("nameserver 192.0.2.53"));

            drop(tun);
            changes.undo_all().expect("undone");
            assert_same(&before, &snapshot());
        },
    );
}

/// Replies that came before the kernel had made the address local were lost, on busy machines.
#[test]
fn an_address_is_in_force_when_it_has_been_set() {
    in_namespace("an_address_is_in_force_when_it_has_been_set", || {
        let (_changes, _tun, tunnel) = begin();
        let netlink = Netlink::open().expect("netlink");
        for number in 1..=ADDRESSES {
            for base in ["10.87.0.0", "fd01::"] {
                let address: IpAddr = match base.parse().expect("address") {
                    IpAddr::V4(base) => Ipv4Addr::from_bits(base.to_bits() + number).into(),
                    IpAddr::V6(base) => {
                        Ipv6Addr::from_bits(base.to_bits() + u128::from(number)).into()
                    }
                };
                netlink
                    .add_address(tunnel.index, IpNet::from(address))
                    .expect("added");
                let socket = UdpSocket::bind((address, 0)).expect("bound");
                socket.set_read_timeout(Some(TIMEOUT)).expect("set");
                let itself = socket.local_addr().expect("address");
                socket.send_to(b"?", itself).expect("sent");
                let arrived = socket.recv(&mut [0]);
                assert_eq!(arrived.expect("what is sent to itself"), 1, "{address}");
            }
        }
    });
}

#[test]
fn another_vpns_routes_are_an_error_and_stay() {
    in_namespace("another_vpns_routes_are_an_error_and_stay", || {
        make_uplinks();
        run("ip route add 128.0.0.0/1 via 192.0.2.77 dev eth0");
        let before = snapshot();
        let (mut changes, tun, tunnel) = begin();
        let host = changes.observe().expect("observed");
        let steps = plan::client(&host, &tunnel, &client_settings()).expect("planned");
        let error = changes
            .reach(&tunnel, &steps)
            .expect_err("taken")
            .to_string();
        assert!(
            error.contains("128.0.0.0/1") && error.contains("VPN"),
            "{error}"
        );
        drop(tun);
        changes.undo_all().expect("undone");
        assert_same(&before, &snapshot());
    });
}

#[test]
fn settings_that_somebody_else_changed_meanwhile_stay() {
    in_namespace("settings_that_somebody_else_changed_meanwhile_stay", || {
        make_uplinks();
        let (mut changes, tun, tunnel) = begin();
        let steps = server_steps(&changes, &tunnel);
        changes.reach(&tunnel, &steps).expect("applied");
        fs::write("/etc/resolv.conf", "nameserver 192.0.2.54\n").expect("by DHCP");
        run("echo 0 > /proc/sys/net/ipv4/conf/eth0/forwarding");
        drop(tun);
        changes.undo_all().expect("undone");
        assert!(run("cat /etc/resolv.conf").contains("192.0.2.54"));
        assert!(!Path::new("/run/ringtun").join("ringtun0").exists());
        assert_eq!(run("cat /proc/sys/net/ipv4/conf/eth0/forwarding"), "0\n");
    });
}
