//! A very short run of the benchmark has every figure that it promises.

use std::path::Path;

use ringtun_lab::bench::{self, Group, Metric, Plan, System, html, svg};
use serde_json::Value;

#[test]
fn a_run_yields_figures_a_report_and_plots() {
    let plan = Plan {
        systems: vec![System::Direct, System::Ringtun],
        metrics: Group::ALL.to_vec(),
        rounds: 1,
        pings: 50,
        connects: 1,
        ..Plan::QUICK
    };
    let (mut labs, mut progress) = (0, Vec::new());
    let figures = bench::run(
        Path::new(env!("CARGO_BIN_EXE_ringtun")),
        plan,
        |_| labs += 1,
        |line| progress.push(line.to_owned()),
    );
    let figures = figures.expect("a lab");
    let progress = progress.join("\n");
    assert!(!figures.has_failed(), "{progress}");
    assert_eq!(labs, 2, "one for each system");
    assert!(
        progress.contains("ringtun: TCP down, 1 stream"),
        "{progress}"
    );

    let json = serde_json::to_value(&figures).expect("plain values");
    for metric in Metric::ALL {
        for system in [System::Direct, System::Ringtun] {
            let run = run(&json, metric, system);
            // Connecting, and processes of a tunnel, are nothing that a path without one has.
            let of_tunnels = matches!(metric.group(), Group::Connect | Group::Memory)
                || metric.key().starts_with("cpu_tunnel");
            if system == System::Direct && of_tunnels {
                assert!(run.is_none(), "{metric:?}");
                continue;
            }
            let run = run.unwrap_or_else(|| panic!("no {metric:?} of {system:?}: {progress}"));
            assert_eq!(run["unit"], metric.unit());
            let median = run["median"].as_f64().expect("a finite number");
            // What a run this short costs may be less than a tick of the clock.
            let is_cost = metric.unit() == "s/GB";
            assert!(median > 0.0 || is_cost && median == 0.0, "{run}");
            assert_eq!(run["samples"].as_array().map(Vec::len), Some(1), "{run}");
        }
    }
    for name in ["tcp_down_1", "tcp_up_4", "udp_up_64", "rtt_idle_us_p50"] {
        let ratio = json["ratios"][name].as_f64().expect("a finite number");
        assert!(ratio > 0.0, "{name}");
        assert_eq!(json["ratios_to"]["direct"][name], ratio, "{name}");
    }
    let systems = json["systems"].as_array().expect("a list");
    for (system, name) in systems.iter().zip(["direct", "ringtun"]) {
        assert_eq!(system["system"], name);
        assert_eq!(system["outcome"], "measured");
    }
    assert!(
        systems[1]["outer_congestion_control"].is_string(),
        "{}",
        systems[1]
    );
    for fact in [
        "kernel",
        "cpu",
        "date",
        "iperf3",
        "inner_congestion_control",
    ] {
        let known = json["machine"][fact]
            .as_str()
            .is_some_and(|text| !text.is_empty());
        assert!(known, "{fact}");
    }
    // One plot for each metric or pair of them, and the costs only where a tunnel has some.
    let page = html::page(&figures);
    assert_eq!(page.matches("<svg ").count(), svg::Plot::ALL.len());
    assert_eq!(
        svg::sheet(&figures, &svg::Plot::FEW).matches("<g ").count(),
        4
    );
}

fn run(figures: &Value, metric: Metric, system: System) -> Option<&Value> {
    let runs = figures["runs"].as_array().expect("a list");
    runs.iter()
        .find(|run| run["metric"] == metric.key() && run["system"] == system.key())
}
