//! OpenConnect against ocserv, over TLS only.

use super::certificate::Certificates;
use super::system::{DIRECTORY, Daemon, File, Setup, Skipped, forwarding, output, owned, program};
use crate::topology::SERVER_V4;

pub(super) fn setup() -> Result<Setup, Skipped> {
    let (ocserv, openconnect) = (program("ocserv")?, program("openconnect")?);
    let certificates = Certificates::make().map_err(|error| Skipped(error.to_string()))?;
    // Debian's /etc/ocserv/ocserv.conf, but for: certificates instead of passwords, no UDP, no limits to how
    // often one may connect, a pool and a default route.
    let config = format!(
        "auth = \"certificate\"\nca-cert = {DIRECTORY}/ca.crt\ncert-user-oid = 2.5.4.3\n\
         server-cert = {DIRECTORY}/server.crt\nserver-key = {DIRECTORY}/server.key\n\
         tcp-port = 443\nrun-as-user = ocserv\nrun-as-group = ocserv\n\
         socket-file = /run/ocserv-socket\npid-file = /run/ocserv.pid\nisolate-workers = true\n\
         max-clients = 16\nmax-same-clients = 0\nrate-limit-ms = 0\nmax-ban-score = 0\n\
         keepalive = 32400\ndpd = 90\nmobile-dpd = 1800\ntry-mtu-discovery = false\n\
         tls-priorities = \"NORMAL:%SERVER_PRECEDENCE:%COMPAT:-VERS-SSL3.0:-VERS-TLS1.0:-VERS-TLS1.1:-VERS-TLS1.3\"\n\
         auth-timeout = 240\ncookie-timeout = 300\ndeny-roaming = false\nrekey-time = 172800\nrekey-method = ssl\n\
         use-occtl = true\nlog-level = 1\ndevice = vpns\npredictable-ips = true\n\
         ipv4-network = 10.9.0.0\nipv4-netmask = 255.255.255.0\nping-leases = false\nroute = default\n\
         cisco-client-compat = true\n"
    );
    let client = owned([
        &openconnect.to_string_lossy(),
        "--no-dtls",
        "--non-inter",
        "--cafile",
        &format!("{DIRECTORY}/ca.crt"),
        "--certificate",
        &format!("{DIRECTORY}/client.crt"),
        "--sslkey",
        &format!("{DIRECTORY}/client.key"),
        &format!("https://{SERVER_V4}/"),
    ]);
    let versions = [(&ocserv, "ocserv"), (&openconnect, "openconnect")].map(|(path, name)| {
        let text = output(path, &["--version"]).unwrap_or_default();
        text.lines().next().unwrap_or(name).to_owned()
    });
    Ok(Setup {
        version: versions.join("; "),
        remark:
            "Debian's ocserv.conf, with certificates for passwords, UDP (DTLS) off on both sides, \
                 and no limits to how often one may connect. TLS 1.2, as that file has it."
                .to_owned(),
        files: vec![
            File::shown("server", "ocserv.conf", config),
            File::secret("server", "ca.crt", certificates.authority.clone()),
            File::secret("server", "server.crt", certificates.server.certificate),
            File::secret("server", "server.key", certificates.server.key),
            File::secret("client", "ca.crt", certificates.authority),
            File::secret("client", "client.crt", certificates.client.certificate),
            File::secret("client", "client.key", certificates.client.key),
        ],
        prepare: forwarding("10.9.0.0/24"),
        server: Some(Daemon {
            command: owned([
                &ocserv.to_string_lossy(),
                "--foreground",
                "--config",
                &format!("{DIRECTORY}/ocserv.conf"),
            ]),
            ready: "sec-mod initialized",
        }),
        client: Some(Daemon {
            command: client,
            ready: "Configured as ",
        }),
        ..Setup::default()
    })
}
