//! A token has the same addresses every time, and a host has one tunnel of a name.

mod common;

use common::{
    RINGTUN, SOON, Tunnel, assert_web_reached, inner_addresses, invite, lab, start_client,
    start_server, stop,
};
use ringtun_lab::Lab;
use rstest::rstest;

#[rstest]
fn addresses_stay_over_restarts_of_client_and_server(lab: Lab) {
    let (one, two) = (lab.host("client"), lab.host("client2"));
    let server = start_server(&lab, &[]);
    let (alice, bob) = (invite(&lab, "alice"), invite(&lab, "bob"));
    let first = start_client(one, &alice);
    let second = start_client(two, &bob);
    let (of_alice, of_bob) = (inner_addresses(one), inner_addresses(two));
    assert_ne!(of_alice, of_bob);
    stop(&first);
    stop(&second);

    // In the other order, and each from the other's host.
    let second = start_client(one, &bob);
    assert_eq!(inner_addresses(one), of_bob);
    let first = start_client(two, &alice);
    assert_eq!(inner_addresses(two), of_alice);
    stop(&first);
    stop(&second);

    stop(&server);
    let _server = start_server(&lab, &[]);
    let _second = start_client(two, &bob);
    assert_eq!(inner_addresses(two), of_bob);
    let _first = start_client(one, &alice);
    assert_eq!(inner_addresses(one), of_alice);

    let listed = lab.host("server").exec(RINGTUN, ["peers"]).expect("peers");
    for (name, addresses) in [("alice", of_alice), ("bob", of_bob)] {
        let line = format!("{name} {} {}", addresses[0], addresses[1]);
        assert!(listed.lines().any(|listed| listed == line), "{listed}");
    }
}

#[rstest]
fn a_newcomer_does_not_get_a_leased_address(lab: Lab) {
    let server = start_server(&lab, &[]);
    let alice = invite(&lab, "alice");
    let client = start_client(lab.host("client"), &alice);
    let of_alice = inner_addresses(lab.host("client"));
    stop(&client);
    stop(&server);

    let _server = start_server(&lab, &[]);
    let _client = start_client(lab.host("client"), &invite(&lab, "bob"));
    let of_bob = inner_addresses(lab.host("client"));
    for (one, other) in of_alice.iter().zip(&of_bob) {
        assert_ne!(one, other, "alice is away, and comes back");
    }
}

#[rstest]
fn a_second_instance_on_a_host_is_refused_and_the_first_goes_on(lab: Lab) {
    let tunnel = Tunnel::start(&lab);
    let another = invite(&lab, "another");
    for (host, arguments) in [
        ("client", ["client", &another]),
        ("server", ["server", "--state-dir=/run/other"]),
    ] {
        let second = lab
            .host(host)
            .command(RINGTUN)
            .args(arguments)
            .limit(SOON)
            .run()
            .expect("an end");
        let complaint = second.errors();
        assert_eq!(second.status.code(), Some(1), "{complaint}");
        assert_eq!(complaint.lines().count(), 1, "{complaint}");
        assert!(
            complaint.contains("already") && complaint.contains("ringtun0"),
            "{complaint}"
        );
    }
    assert_eq!(tunnel.client.status(), None);
    assert_eq!(tunnel.server.status(), None);
    assert_web_reached(lab.host("client"));
}
