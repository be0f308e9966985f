//! The `nat` topology lets out TCP 80 and 443 and nothing else, in both families.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::thread;
use std::time::Duration;

use ringtun_lab::probe::{self, Answer};
use ringtun_lab::topology::{
    CLIENT_V4, FIREWALL_V4, FIREWALL_V6, SERVER_V4, SERVER_V6, WEB_TCP_PORTS, WEB_UDP_PORTS,
    WEB_V4, WEB_V6,
};
use ringtun_lab::{Lab, Topology};
use rstest::rstest;

/// What passes has this long, so that a busy machine does not fail the test.
const PASSES: Duration = Duration::from_secs(20);
/// What is dropped is waited for this long.
const DROPPED: Duration = Duration::from_millis(500);

#[rstest]
#[case::v4(WEB_V4, SERVER_V4, FIREWALL_V4)]
#[case::v6(WEB_V6, SERVER_V6, FIREWALL_V6)]
fn only_web_ports_leave_the_lan(
    #[case] web: impl Into<IpAddr>,
    #[case] server: impl Into<IpAddr>,
    #[case] firewall: impl Into<IpAddr>,
    #[values("client", "client2")] client: &str,
) {
    let (web, server, firewall) = (web.into(), server.into(), firewall.into());
    let lab = Lab::build(Topology::Nat).expect("a lab");
    let (client, outside) = (lab.host(client), lab.host("server"));
    thread::scope(|scope| {
        for port in WEB_TCP_PORTS {
            scope.spawn(move || {
                let to = SocketAddr::new(web, port);
                let answer = probe::tcp(outside, to, PASSES).expect("the server's host");
                assert_eq!(
                    answer,
                    Answer::SawSource(server),
                    "TCP {port} from the internet side"
                );
                let (limit, expected) = match port {
                    80 | 443 => (PASSES, Answer::SawSource(firewall)),
                    _ => (DROPPED, Answer::Nothing(io::ErrorKind::TimedOut)),
                };
                let answer = probe::tcp(client, to, limit).expect("the client's host");
                assert_eq!(answer, expected, "TCP {port} from the LAN");
            });
        }
        for port in WEB_UDP_PORTS {
            scope.spawn(move || {
                let to = SocketAddr::new(web, port);
                let answer = probe::udp(outside, to, PASSES).expect("the server's host");
                assert_eq!(
                    answer,
                    Answer::SawSource(server),
                    "UDP {port} from the internet side"
                );
                let answer = probe::udp(client, to, DROPPED).expect("the client's host");
                assert_eq!(
                    answer,
                    Answer::Nothing(io::ErrorKind::WouldBlock),
                    "UDP {port} from the LAN"
                );
            });
        }
        scope.spawn(move || {
            assert!(outside.ping(web, 3).expect("ping").is_complete());
            assert!(client.ping(web, 3).expect("ping").is_silent());
        });
    });
}

#[test]
fn the_internet_does_not_reach_into_the_lan() {
    let lab = Lab::build(Topology::Nat).expect("a lab");
    let at = SocketAddr::from((CLIENT_V4, 80));
    let listener = lab
        .host("client")
        .enter(|| TcpListener::bind(at))
        .expect("the client's host");
    let _listener = listener.expect("a free port");
    let route = ["route", "add", "192.168.77.0/24", "via", "192.0.2.2"];
    lab.host("internet")
        .exec("ip", route)
        .expect("a route to the LAN");
    assert!(probe::connects(lab.host("client2"), at, PASSES).expect("the other client's host"));
    assert!(!probe::connects(lab.host("internet"), at, DROPPED).expect("the internet's host"));
}
