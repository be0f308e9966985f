//! The report as one page that needs nothing else: ratios first, then plots and tables, then how it was done.

use std::fmt::{Display, Write};

use super::figures::{Entry, Figures, Outcome};
use super::metric::{Group, Metric, times};
use super::svg::{self, Plot, unit};
use super::system::System;
use super::udp::WINDOW_PACKETS;

const STYLE: &str = "
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#59636e;--page:#fff;--card:#f6f8fa;--line:#d9dee4;--accent:#d9480f}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9198a1;--page:#0d1117;--card:#161b22;--line:#30363d;--accent:#ff7a3d}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif}
main{max-width:1080px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:28px;line-height:1.2;margin:0 0 4px}
h2{font-size:21px;margin:48px 0 4px;padding-top:16px;border-top:1px solid var(--line)}
h3{font-size:16px;margin:20px 0 4px}
p{margin:6px 0 14px;max-width:76ch}
.soft,small{color:var(--soft)}small{font-size:13px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:14px;margin:22px 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:14px 16px}
.tile b{display:block;white-space:nowrap;font-size:28px;line-height:1.15;color:var(--accent)}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(420px,1fr));gap:26px 32px;margin:18px 0}
.plots svg{width:100%;height:auto;display:block}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums;margin:10px 0;width:100%}
th,td{padding:6px 10px;border-bottom:1px solid var(--line);text-align:right;vertical-align:top;white-space:nowrap}
th{white-space:normal}
th:first-child,td:first-child{text-align:left;padding-left:0}
td small{display:block}
.mine{color:var(--accent);font-weight:600}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 18px;font-size:14px;margin:10px 0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
pre{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:10px 12px;overflow-x:auto;font-size:13px;line-height:1.45}
details{margin:8px 0}summary{cursor:pointer}
.bad{border-left:4px solid #cf222e;padding:4px 12px;background:var(--card)}
@media(max-width:520px){.plots{grid-template-columns:1fr}main{padding:20px 14px}}
";

/// The whole page.
#[must_use]
pub fn page(figures: &Figures) -> String {
    let mut page =
        String::from("<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n");
    let _ = write!(
        page,
        "<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n<title>ringtun compared, {}</title>\n\
         <style>{STYLE}{}</style>\n</head>\n<body>\n<main>\n",
        text(figures.machine.date.get(..10).unwrap_or_default()),
        svg::STYLE
    );
    headline(&mut page, figures);
    for group in Group::ALL {
        section(&mut page, figures, group);
    }
    ratios(&mut page, figures);
    method(&mut page, figures);
    machine(&mut page, figures);
    systems(&mut page, figures);
    page + "</main>\n</body>\n</html>\n"
}

/// What somebody who reads nothing else should know.
fn headline(page: &mut String, figures: &Figures) {
    let machine = &figures.machine;
    let _ = write!(
        page,
        "<h1>ringtun compared</h1>\n<p class=\"soft\">{} &middot; {} cores of {} &middot; Linux {} &middot; all hosts on this one \
         machine &middot; medians of {} rounds, taking turns</p>\n",
        text(&machine.date.replace('T', " ").replace('Z', " UTC")),
        machine.cores,
        text(&machine.cpu),
        text(&machine.kernel),
        figures.plan.rounds
    );
    for entry in figures
        .systems
        .iter()
        .filter(|entry| entry.outcome == Outcome::Failed)
    {
        let _ = writeln!(
            page,
            "<p class=\"bad\"><b>{}</b> failed, and its figures are incomplete: see below.</p>",
            entry.title
        );
    }
    page.push_str("<div class=\"tiles\">\n");
    let mut tile = |figure: String, what: String| {
        let _ = writeln!(page, "<div class=\"tile\"><b>{figure}</b>{what}</div>");
    };
    for (down, up, what) in [
        (Metric::TcpDown1, Metric::TcpUp1, "one TCP stream"),
        (Metric::TcpDown4, Metric::TcpUp4, "four TCP streams"),
    ] {
        let ratio = |metric| figures.ratios.get(&metric).copied();
        if let (Some(down), Some(up)) = (ratio(down), ratio(up)) {
            tile(
                format!("{} / {}", times(down), times(up)),
                format!("of the speed without a tunnel, {what}, down / up"),
            );
        }
    }
    for (system, ratios) in &figures.ratios_to {
        let both = [Metric::TcpDown1, Metric::TcpUp1].map(|metric| ratios.get(&metric).copied());
        if let ([Some(down), Some(up)], false) = (
            both,
            [System::Direct, System::RingtunBaseline].contains(system),
        ) {
            tile(
                format!("{}\u{d7} / {}\u{d7}", times(down), times(up)),
                format!("the speed of {}, one TCP stream, down / up", system.title()),
            );
        }
    }
    let cost = |metric| Some(figures.run(metric, System::Ringtun)?.median);
    if let (Some(down), Some(up)) = (cost(Metric::CpuTunnelDown), cost(Metric::CpuTunnelUp)) {
        tile(
            format!("{down:.2} / {up:.2} s"),
            "of processor time for a gigabyte, both sides of the tunnel together, down / up"
                .to_owned(),
        );
    }
    page.push_str("</div>\n");
}

/// Plots and a table of one group of metrics.
fn section(page: &mut String, figures: &Figures, group: Group) {
    let plots: Vec<String> = Plot::ALL
        .into_iter()
        .filter(|plot| plot.metric.group() == group)
        .filter_map(|plot| plot.draw(figures))
        .collect();
    if plots.is_empty() {
        return;
    }
    let _ = write!(
        page,
        "<h2 id=\"{0}\">{0}</h2>\n<p>{1}</p>\n<div class=\"plots\">\n{2}\n</div>\n",
        group.title(),
        explained(group),
        plots.join("\n")
    );
    let systems: Vec<System> = figures.measured().collect();
    let rows = Metric::ALL
        .into_iter()
        .filter(|metric| metric.group() == group)
        .map(|metric| {
            let cells = systems
                .iter()
                .map(|system| match figures.run(metric, *system) {
                    Some(run) => format!(
                        "{}<small>{} \u{2013} {}</small>",
                        metric.text(run.median),
                        metric.text(run.min),
                        metric.text(run.max)
                    ),
                    None => "\u{2013}".to_owned(),
                });
            let name = format!("{}<small>{}</small>", metric.title(), unit(metric));
            (name, cells.collect())
        });
    table(
        page,
        "median, and the range of all rounds",
        &systems,
        rows.collect(),
    );
}

/// ringtun as a multiple of every other system.
fn ratios(page: &mut String, figures: &Figures) {
    let systems: Vec<System> = figures.ratios_to.keys().copied().collect();
    if systems.is_empty() {
        return;
    }
    page.push_str(
        "<h2 id=\"ratios\">ringtun as a multiple of the others</h2>\n\
         <p>The medians of ringtun divided by theirs, from this run. Absolute figures differ from machine to machine; these hardly do.</p>\n",
    );
    let rows = Metric::ALL.into_iter().filter_map(|metric| {
        let cells: Vec<String> = systems
            .iter()
            .map(|system| match figures.ratios_to[system].get(&metric) {
                Some(ratio) => times(*ratio) + "\u{d7}",
                None => "\u{2013}".to_owned(),
            })
            .collect();
        let better = if metric.more_is_better() {
            "more"
        } else {
            "less"
        };
        let name = format!("{}<small>{better} is better</small>", metric.title());
        cells
            .iter()
            .any(|cell| cell != "\u{2013}")
            .then_some((name, cells))
    });
    table(page, "ringtun divided by", &systems, rows.collect());
}

fn table(page: &mut String, corner: &str, systems: &[System], rows: Vec<(String, Vec<String>)>) {
    let class = |system: &System| match system {
        System::Ringtun => " class=\"mine\"",
        _ => "",
    };
    let _ = write!(
        page,
        "<div class=\"scroll\"><table>\n<tr><th><small>{corner}</small></th>"
    );
    for system in systems {
        let _ = write!(page, "<th{}>{}</th>", class(system), system.title());
    }
    page.push_str("</tr>\n");
    for (name, cells) in rows {
        let _ = write!(page, "<tr><td>{name}</td>");
        for (system, cell) in systems.iter().zip(cells) {
            let _ = write!(page, "<td{}>{cell}</td>", class(system));
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</table></div>\n");
}

/// What a section's figures mean.
fn explained(group: Group) -> String {
    match group {
        Group::Tcp => "iperf3 from the client host to the web host, counted by the receiver. Processor time belongs to the \
            run of one stream: of the tunnel, what all processes of its client and its server used, softirqs in their system calls \
            included; of the machine, everything that was not idle, with iperf3, the firewall and the network."
            .to_owned(),
        Group::Udp => format!(
            "One flow of datagrams, each a packet of its own, counted where a program receives them; 64 and 1200 bytes of payload. \
             The sender keeps the path full, but is never more than {WINDOW_PACKETS} packets ahead of the latest one that has arrived, so \
             that it does not take the processors from the tunnel."
        ),
        Group::Rtt => "ICMP echo every 10 ms from the client host to the web host: on an idle path, beside one TCP stream at full \
            speed, and beside one each way. A lost echo counts as one second."
            .to_owned(),
        Group::Fairness => "Eight TCP streams at once: Jain's index of what each gets, 1 where all get the same. Beside them, one TCP \
            connection with a request of 64 bytes now and then, from it to its response."
            .to_owned(),
        Group::Connect => "From the start of the client program, with its server up, to the first echo reply from the web host; one echo \
            request is sent every millisecond."
            .to_owned(),
        Group::Memory => "Resident memory (VmRSS) of all processes of a side: connected and idle, and the most it ever was (VmHWM) at the end \
            of each round. A page that processes share counts for each of them."
            .to_owned(),
    }
}

fn method(page: &mut String, figures: &Figures) {
    let plan = &figures.plan;
    let _ = write!(
        page,
        "<h2 id=\"method\">How it was measured</h2>\n\
         <p>Hosts are network namespaces, joined by veth: client &ndash; firewall &ndash; internet &ndash; server, and web beside the \
         server. The topology is \"{}\". Every system has such a network of its own. All systems are up at the same time, but only one is measured at any \
         moment, and they take turns at every figure: A B C A B C. Every round begins with new networks and with another system. All of \
         it, iperf3 at both ends included, shares the processors of this one machine.</p>\n\
         <dl><dt>rounds</dt><dd>{}</dd><dt>each rate</dt><dd>{} s, after {} s of a TCP stream that do not count</dd>\
         <dt>each round trip</dt><dd>{} echoes</dd><dt>each connection time</dt><dd>{} starts</dd></dl>\n",
        plan.topology.name(),
        plan.rounds,
        plan.seconds,
        plan.omitted_seconds,
        plan.pings,
        plan.connects
    );
}

fn machine(page: &mut String, figures: &Figures) {
    let machine = &figures.machine;
    let busy: Vec<String> = machine
        .busy_before_rounds_percent
        .iter()
        .map(|busy| format!("{busy:.0} %"))
        .collect();
    page.push_str("<h2 id=\"machine\">The machine</h2>\n<dl>\n");
    let mut line = |name: &str, value: &dyn Display| {
        let _ = writeln!(page, "<dt>{name}</dt><dd>{}</dd>", text(&value.to_string()));
    };
    line(
        "processor",
        &format!("{} cores of {}", machine.cores, machine.cpu),
    );
    line("memory", &format!("{} MiB", machine.memory_mib));
    line("kernel", &format!("Linux {}", machine.kernel));
    line(
        "congestion control at the ends",
        &figures.inner_congestion_control(),
    );
    line("iperf3", &machine.iperf3);
    line(
        "source",
        &machine
            .commit
            .as_deref()
            .unwrap_or("not in a git work tree"),
    );
    line("date", &machine.date);
    line("busy with other things before each round", &busy.join(", "));
    page.push_str("</dl>\n");
}

fn systems(page: &mut String, figures: &Figures) {
    page.push_str("<h2 id=\"systems\">The systems, and every command</h2>\n");
    for entry in &figures.systems {
        system(page, entry);
    }
}

fn system(page: &mut String, entry: &Entry) {
    let _ = writeln!(page, "<h3>{}</h3>", entry.title);
    match (entry.outcome, &entry.reason) {
        (Outcome::Skipped, reason) => {
            let reason = reason.as_deref().unwrap_or_default();
            let _ = writeln!(page, "<p>Skipped: {}.</p>", text(reason));
            return;
        }
        (Outcome::Failed, reason) => {
            let reason = reason.as_deref().unwrap_or_default();
            let _ = writeln!(
                page,
                "<div class=\"bad\">Failed:<pre>{}</pre></div>",
                text(reason)
            );
        }
        (Outcome::Measured, _) => {}
    }
    let setup = &entry.setup;
    let _ = writeln!(
        page,
        "<p>{}<br><small>{}</small></p>",
        text(&setup.remark),
        text(&setup.version)
    );
    if let Some(outer) = &entry.outer_congestion_control {
        let _ = writeln!(
            page,
            "<p><small>congestion control of its own connection: {}</small></p>",
            text(outer)
        );
    }
    let _ = writeln!(
        page,
        "<details><summary>commands</summary><pre>{}</pre></details>",
        text(&entry.commands.join("\n"))
    );
    for file in setup.files.iter() {
        if let Some(contents) = &file.shown {
            let _ = writeln!(
                page,
                "<details><summary>{} on {}</summary><pre>{}</pre></details>",
                text(&file.path),
                file.host,
                text(contents)
            );
        }
    }
}

/// Text that stands for itself.
fn text(raw: &str) -> String {
    raw.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::figures::tests::figures;

    #[test]
    fn the_page_needs_nothing_else() {
        let page = page(&figures());
        // The only addresses in it are those in commands and configurations.
        for needing in [
            "src=", "href=", "url(", "@import", "<script", "<link", "<img",
        ] {
            assert!(!page.contains(needing), "{needing}");
        }
        assert!(page.starts_with("<!doctype html>") && page.ends_with("</html>\n"));
    }

    #[test]
    fn it_says_what_and_where_and_how() {
        let figures = figures();
        let page = page(&figures);
        for part in [
            "0.47\u{d7}",
            Group::Tcp.title(),
            Group::Rtt.title(),
            "How it was measured",
            "The machine",
            "every command",
            &figures.machine.kernel,
            "client# RINGTUN_INVITE=$RINGTUN_INVITE ringtun client",
            "Skipped: ocserv is not installed.",
            "2,000<small>1,000 \u{2013} 3,000</small>",
        ] {
            assert!(page.contains(part), "{part}");
        }
        // Nothing was measured of these.
        assert!(!page.contains(Group::Udp.title()) && !page.contains(Group::Memory.title()));
    }

    #[test]
    fn a_failure_is_shown_and_cannot_break_the_page() {
        let page = page(&figures());
        assert!(page.contains("| &lt;no&gt; &amp; why"), "{page}");
        assert!(page.contains("its figures are incomplete"), "{page}");
    }

    #[test]
    fn elements_are_closed() {
        let page = page(&figures());
        for element in [
            "div", "table", "tr", "td", "th", "dl", "dd", "p", "pre", "details", "svg", "small",
            "h2",
        ] {
            let opened = page.matches(&format!("<{element}>")).count()
                + page.matches(&format!("<{element} ")).count();
            assert_eq!(
                opened,
                page.matches(&format!("</{element}>")).count(),
                "{element}"
            );
        }
    }
}
