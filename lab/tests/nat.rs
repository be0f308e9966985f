//! The `nat` topology lets out TCP 80 and 443 and nothing else, in both families.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ringtun_lab::probe::{self, Answer};
use ringtun_lab::topology::{
    FIREWALL_V4, FIREWALL_V6, SERVER_V4, SERVER_V6, WEB_TCP_PORTS, WEB_UDP_PORTS, WEB_V4, WEB_V6,
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
) {
    let (web, server, firewall) = (web.into(), server.into(), firewall.into());
    let lab = Lab::build(Topology::Nat).expect("a lab");
    for client in ["client", "client2"] {
        let client = lab.host(client);
        for port in WEB_TCP_PORTS {
            let to = SocketAddr::new(web, port);
            let answer = probe::tcp(lab.host("server"), to, PASSES).expect("the server's host");
            assert_eq!(
                answer,
                Answer::SawSource(server),
                "TCP {port} from the internet side"
            );
            if [80, 443].contains(&port) {
                let answer = probe::tcp(client, to, PASSES).expect("the client's host");
                assert_eq!(
                    answer,
                    Answer::SawSource(firewall),
                    "TCP {port} from the LAN"
                );
            } else {
                let answer = probe::tcp(client, to, DROPPED).expect("the client's host");
                assert_eq!(
                    answer,
                    Answer::Nothing(io::ErrorKind::TimedOut),
                    "TCP {port} from the LAN"
                );
            }
        }
        for port in WEB_UDP_PORTS {
            let to = SocketAddr::new(web, port);
            let answer = probe::udp(lab.host("server"), to, PASSES).expect("the server's host");
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
        }
        assert!(lab.host("server").ping(web, 3).expect("ping").is_complete());
        assert!(client.ping(web, 3).expect("ping").is_silent());
    }
}

#[test]
fn the_internet_does_not_reach_into_the_lan() {
    let lab = Lab::build(Topology::Nat).expect("a lab");
    let listener = lab.host("client").spawn("nc", ["-l", "80"]).expect("nc");
    let route = ["route", "add", "192.168.77.0/24", "via", "192.0.2.2"];
    lab.host("internet")
        .exec("ip", route)
        .expect("a route to the LAN");
    let to = SocketAddr::new(ringtun_lab::topology::CLIENT_V4.into(), 80);
    let answer = probe::tcp(lab.host("internet"), to, DROPPED).expect("the internet's host");
    assert_eq!(answer, Answer::Nothing(io::ErrorKind::TimedOut));
    assert_eq!(listener.status(), None, "the listener is still waiting");
}
