//! A state file that is damaged, empty or gone while the server runs costs nobody the connection.

mod common;

use common::{RINGTUN, SOON, Tunnel, assert_ended, assert_web_reached, lab, start_client, stop};
use ringtun_lab::Lab;
use rstest::rstest;

const PEERS: &str = "/var/lib/ringtun/peers.toml";

#[rstest]
#[case::emptied(": > peers.toml", "it is empty")]
#[case::blank("printf ' \\n' > peers.toml", "it is empty")]
#[case::removed("rm peers.toml", "is missing")]
#[case::moved_away("mv peers.toml elsewhere", "is missing")]
#[case::damaged("echo '[[peer' > peers.toml", "is damaged")]
#[case::with_all_leases("rm leases.toml; : > peers.toml", "it is empty")]
fn a_lost_list_of_peers_revokes_nobody(lab: Lab, #[case] lose: &str, #[case] named: &str) {
    let tunnel = Tunnel::start(&lab);
    let host = lab.host("server");
    let directory = PEERS.strip_suffix("/peers.toml").expect("a directory");
    let sh = |script: &str| {
        let script = format!("cd {directory} && {script}");
        host.exec("sh", ["-c", &script]).expect("sh")
    };
    sh("cp -p peers.toml backup");
    let mark = tunnel.server.mark();
    sh(lose);
    let line = tunnel
        .server
        .wait_for_line_after(mark, "the peers stay as they were", SOON)
        .expect("an error line");
    assert!(line.contains(named) && line.contains("ERROR"), "{line}");
    // Neither the connection that there is, nor the next one, is refused.
    assert_web_reached(lab.host("client"));
    stop(&tunnel.client);
    let client = start_client(lab.host("client"), &tunnel.invite);
    assert_web_reached(lab.host("client"));

    let mark = tunnel.server.mark();
    sh("mv backup peers.toml");
    tunnel
        .server
        .wait_for_line_after(mark, "can be read again", SOON)
        .expect("a line that it is well again");
    // Revoking the last one leaves an explicit list of nobody, which counts.
    host.exec(RINGTUN, ["peers", "revoke", "client"])
        .expect("revoked");
    assert_ended(&client, 1);
    stop(&tunnel.server);
}
