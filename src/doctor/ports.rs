//! Which program listens on a port, found in `/proc`.

use std::fs;

/// The state LISTEN in `/proc/net/tcp` (TCP_LISTEN of the kernel).
const LISTEN: &str = "0A";

/// The name and number of a process that listens on `port` in this network namespace, where it can be seen. Of several
/// that share the socket it is the oldest.
pub fn listener(port: u16) -> Option<(String, i32)> {
    let inodes: Vec<String> = ["tcp", "tcp6"]
        .iter()
        .filter_map(|table| fs::read_to_string(format!("/proc/thread-self/net/{table}")).ok())
        .flat_map(|table| inodes(&table, port))
        .collect();
    let links: Vec<String> = inodes
        .iter()
        .map(|inode| format!("socket:[{inode}]"))
        .collect();
    let entries = fs::read_dir("/proc").ok()?.flatten();
    let mut processes: Vec<(u64, i32)> = entries
        .filter_map(|entry| {
            let number = entry.file_name().to_str()?.parse().ok()?;
            Some((start_time(number)?, number))
        })
        .collect();
    processes.sort_unstable();
    let (_, owner) = processes.into_iter().find(|(_, number)| {
        let files = fs::read_dir(format!("/proc/{number}/fd"));
        files.into_iter().flatten().flatten().any(|file| {
            fs::read_link(file.path()).is_ok_and(|link| {
                links
                    .iter()
                    .any(|wanted| link.as_os_str() == wanted.as_str())
            })
        })
    })?;
    let name = fs::read_to_string(format!("/proc/{owner}/comm")).ok()?;
    Some((name.trim_end().to_owned(), owner))
}

/// When a process began, as far as that orders processes.
fn start_time(process: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(") ")?;
    // Field 22 of proc_pid_stat(5); the state, field 3, is the first here.
    fields.split(' ').nth(22 - 3)?.parse().ok()
}

/// The sockets that listen on `port` in a table as `/proc/net/tcp` has it.
fn inodes(table: &str, port: u16) -> Vec<String> {
    let lines = table.lines().skip(1).filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (local, state, inode) = (fields.get(1)?, fields.get(3)?, fields.get(9)?);
        let (_, local_port) = local.rsplit_once(':')?;
        let is_it = u16::from_str_radix(local_port, 16) == Ok(port) && *state == LISTEN;
        is_it.then(|| (*inode).to_owned())
    });
    lines.collect()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn this_process_is_found_by_its_port() {
        let socket = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = socket.local_addr().expect("its address").port();
        let (_, owner) = listener(port).expect("somebody");
        assert_eq!(owner, nix::unistd::getpid().as_raw());
    }

    #[test]
    fn only_listening_sockets_count() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
             0: 00000000:01BB 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1\n   \
             1: 0100007F:01BB 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0        0 4712 1\n";
        assert_eq!(inodes(table, 443), ["4711"]);
        assert!(inodes(table, 80).is_empty());
    }
}
