//! Nothing of ringtun is left on a host when it has ended, whatever the end was.

mod common;

use common::host_state::HostState;
use common::processes::{daemon_of, in_host, kill_9, kill_9_both};
use common::{
    RINGTUN, SOON, Tunnel, assert_ended, assert_web_reached, lab, start_client, start_server, stop,
    until_true,
};
use ringtun_lab::topology::WEB_V4;
use ringtun_lab::{Host, Lab, Process};
use rstest::rstest;

/// How the client's resolver configuration is kept.
#[derive(Clone, Copy, Debug)]
enum ResolvConf {
    File,
    Symlink,
    BindMount,
}

/// Which side something happens to.
#[derive(Clone, Copy, Debug)]
enum Side {
    Client,
    Server,
}

/// Who is killed without a chance to clean up.
#[derive(Clone, Copy, Debug)]
enum Killed {
    KeeperAlone,
    Both,
}

#[rstest]
fn ctrl_c_leaves_nothing(
    lab: Lab,
    #[values(ResolvConf::File, ResolvConf::Symlink, ResolvConf::BindMount)] kept: ResolvConf,
) {
    prepare_resolv_conf(lab.host("client"), kept);
    let before = Before::of(&lab);
    let tunnel = Tunnel::start(&lab);
    before.assert_changed();
    let resolver = lab.host("client").read_file("/etc/resolv.conf");
    assert!(
        resolver.expect("a file").contains(&WEB_V4.to_string()),
        "the server's name server is in use"
    );
    stop(&tunnel.client);
    before.assert_restored(Side::Client, "after Ctrl-C on the client");
    stop(&tunnel.server);
    before.assert_restored(Side::Server, "after Ctrl-C on the server");
}

#[rstest]
fn the_server_may_be_stopped_first(lab: Lab) {
    let before = Before::of(&lab);
    let tunnel = Tunnel::start(&lab);
    stop(&tunnel.server);
    before.assert_restored(Side::Server, "after Ctrl-C on the server");
    stop(&tunnel.client);
    before.assert_restored(Side::Client, "after Ctrl-C on the client");
}

#[rstest]
fn the_server_may_be_killed_first(lab: Lab) {
    let before = Before::of(&lab);
    let tunnel = Tunnel::start(&lab);
    kill_9_both(&tunnel.server);
    stop(&tunnel.client);
    before.assert_restored(Side::Client, "after Ctrl-C on a client without a server");
}

#[rstest]
fn sigterm_is_as_good_as_ctrl_c(lab: Lab) {
    let before = Before::of(&lab);
    let tunnel = Tunnel::start(&lab);
    for (process, side) in [
        (&tunnel.client, Side::Client),
        (&tunnel.server, Side::Server),
    ] {
        let status = process.stop(SOON).expect("the end");
        assert_eq!(status.code(), Some(0));
        before.assert_restored(side, "after SIGTERM");
    }
}

#[rstest]
fn the_keeper_cleans_up_after_a_killed_daemon(
    lab: Lab,
    #[values(Side::Client, Side::Server)] side: Side,
) {
    let before = Before::of(&lab);
    let tunnel = Tunnel::start(&lab);
    let keeper = side.process(&tunnel);
    kill_9(daemon_of(keeper));
    assert_ended(keeper, 1);
    before.assert_restored(side, "after kill -9 of the daemon");
}

#[rstest]
fn down_cleans_up_after_the_killed(
    lab: Lab,
    #[values(Side::Client, Side::Server)] side: Side,
    #[values(Killed::KeeperAlone, Killed::Both)] killed: Killed,
) {
    let before = Before::of(&lab);
    let tunnel = Tunnel::start(&lab);
    kill(side.process(&tunnel), killed);
    until_true("end of all its processes", || {
        in_host(side.host(&lab)).is_empty()
    });
    assert_ne!(
        HostState::of(side.host(&lab)),
        *before.state(side),
        "there is something to clean up"
    );
    side.host(&lab).exec(RINGTUN, ["down"]).expect("down");
    before.assert_restored(side, "after ringtun down");
}

#[rstest]
fn the_next_start_cleans_up_after_the_killed(
    lab: Lab,
    #[values(Side::Client, Side::Server)] side: Side,
    #[values(Killed::KeeperAlone, Killed::Both)] killed: Killed,
) {
    let before = Before::of(&lab);
    let mut tunnel = Tunnel::start(&lab);
    kill(side.process(&tunnel), killed);
    until_true("end of all its processes", || {
        in_host(side.host(&lab)).is_empty()
    });
    match side {
        Side::Client => tunnel.client = start_client(lab.host("client"), &tunnel.invite),
        Side::Server => tunnel.server = start_server(&lab, &[]),
    }
    assert_web_reached(lab.host("client"));
    stop(&tunnel.client);
    stop(&tunnel.server);
    before.assert_restored(Side::Client, "after the second run");
    before.assert_restored(Side::Server, "after the second run");
}

#[rstest]
fn down_stops_what_runs(lab: Lab) {
    let before = Before::of(&lab);
    let tunnel = Tunnel::start(&lab);
    for side in [Side::Client, Side::Server] {
        side.host(&lab).exec(RINGTUN, ["down"]).expect("down");
        assert_ended(side.process(&tunnel), 0);
        before.assert_restored(side, "after ringtun down");
    }
}

#[rstest]
fn down_has_nothing_to_do_on_a_clean_host(lab: Lab) {
    let before = Before::of(&lab);
    lab.host("client").exec(RINGTUN, ["down"]).expect("down");
    before.assert_restored(Side::Client, "after ringtun down");
}

impl Side {
    fn host(self, lab: &Lab) -> &Host {
        match self {
            Side::Client => lab.host("client"),
            Side::Server => lab.host("server"),
        }
    }

    fn process(self, tunnel: &Tunnel) -> &Process {
        match self {
            Side::Client => &tunnel.client,
            Side::Server => &tunnel.server,
        }
    }
}

/// Both hosts before ringtun was started.
struct Before<'lab> {
    lab: &'lab Lab,
    client: HostState,
    server: HostState,
}

impl<'lab> Before<'lab> {
    fn of(lab: &'lab Lab) -> Before<'lab> {
        Before {
            lab,
            client: HostState::of(lab.host("client")),
            server: HostState::of(lab.host("server")),
        }
    }

    fn state(&self, side: Side) -> &HostState {
        match side {
            Side::Client => &self.client,
            Side::Server => &self.server,
        }
    }

    fn assert_changed(&self) {
        for side in [Side::Client, Side::Server] {
            assert_ne!(HostState::of(side.host(self.lab)), *self.state(side));
        }
    }

    fn assert_restored(&self, side: Side, when: &str) {
        let host = side.host(self.lab);
        assert_eq!(in_host(host), [""; 0], "{when}, a process is left");
        self.state(side).assert_same(&HostState::of(host), when);
    }
}

fn kill(keeper: &Process, killed: Killed) {
    match killed {
        Killed::KeeperAlone => kill_9(keeper.pid()),
        Killed::Both => kill_9_both(keeper),
    }
}

fn prepare_resolv_conf(client: &Host, kept: ResolvConf) {
    let script = match kept {
        ResolvConf::File => return,
        ResolvConf::Symlink => {
            "mkdir /run/resolver && mv /etc/resolv.conf /run/resolver/stub.conf && \
             ln -s ../run/resolver/stub.conf /etc/resolv.conf"
        }
        ResolvConf::BindMount => {
            "cp /etc/resolv.conf /run/mounted.conf && mount --bind /run/mounted.conf /etc/resolv.conf"
        }
    };
    client
        .exec("sh", ["-c", script])
        .expect("another resolv.conf");
}
