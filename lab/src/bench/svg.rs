//! Plots: horizontal bars, one for each system, as SVG that needs nothing else.

use std::fmt::Write;

use super::figures::Figures;
use super::metric::{Metric, times};
use super::system::System;

/// The size of one plot, in SVG user units.
const WIDTH: f64 = 470.0;
const HEAD_HEIGHT: f64 = 48.0;
const ROW_HEIGHT: f64 = 26.0;
const FOOT_HEIGHT: f64 = 10.0;
/// Where bars begin and how long the longest is; behind it is room for its figure.
const BARS_X: f64 = 154.0;
const BARS_WIDTH: f64 = 188.0;
const BAR_HEIGHT: f64 = 16.0;
/// Between the plots of [`sheet`].
const GAP: f64 = 28.0;
/// A bar that is too short to be seen is drawn this long.
const BAR_WIDTH_MIN: f64 = 1.5;

/// The colours of plots, light and dark. Tunnels of others are grey, so that ringtun stands out.
pub const STYLE: &str = "
.plot text{font:13px system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;fill:#1b1f24}
.plot .title{font-size:14px;font-weight:600}
.plot .soft{fill:#59636e;font-size:12px}
.plot .axis{stroke:#8b949e;stroke-width:1}
.plot .spread{stroke:#1b1f24;stroke-width:1.5;opacity:.55}
.plot .direct{fill:#9fb4c7}.plot .ringtun{fill:#d9480f}.plot .baseline{fill:#f2a16f}.plot .other{fill:#c3c8ce}
.plot .beyond{opacity:.45}
@media(prefers-color-scheme:dark){
.plot text{fill:#e6edf3}.plot .soft{fill:#9198a1}.plot .axis{stroke:#656c76}.plot .spread{stroke:#e6edf3}
.plot .direct{fill:#4f6b85}.plot .ringtun{fill:#ff7a3d}.plot .baseline{fill:#a85a30}.plot .other{fill:#545b64}
}
";

/// What one plot shows: a metric, and a second one that goes on where the first ends.
#[derive(Clone, Copy, Debug)]
pub struct Plot {
    /// What it says on top.
    pub title: &'static str,
    /// The bar.
    pub metric: Metric,
    /// What the paler part of the bar reaches to, and its name.
    pub beyond: Option<(Metric, &'static str)>,
}

impl Plot {
    const fn of(title: &'static str, metric: Metric) -> Plot {
        Plot {
            title,
            metric,
            beyond: None,
        }
    }

    const fn up_to(
        title: &'static str,
        metric: Metric,
        beyond: Metric,
        name: &'static str,
    ) -> Plot {
        Plot {
            title,
            metric,
            beyond: Some((beyond, name)),
        }
    }

    /// One for every metric, in the order of the report.
    pub const ALL: [Plot; 26] = [
        Plot::of("TCP down, 1 stream", Metric::TcpDown1),
        Plot::of("TCP up, 1 stream", Metric::TcpUp1),
        Plot::of("TCP down, 4 streams", Metric::TcpDown4),
        Plot::of("TCP up, 4 streams", Metric::TcpUp4),
        Plot::of(
            "CPU of the tunnel, both sides, TCP down",
            Metric::CpuTunnelDown,
        ),
        Plot::of("CPU of the tunnel, both sides, TCP up", Metric::CpuTunnelUp),
        Plot::of("CPU of the whole machine, TCP down", Metric::CpuMachineDown),
        Plot::of("CPU of the whole machine, TCP up", Metric::CpuMachineUp),
        Plot::of("UDP down, 64 B", Metric::UdpDown64),
        Plot::of("UDP up, 64 B", Metric::UdpUp64),
        Plot::of("UDP down, 1200 B", Metric::UdpDown1200),
        Plot::of("UDP up, 1200 B", Metric::UdpUp1200),
        Plot::up_to(
            "Round trip, idle",
            Metric::RttIdleP50,
            Metric::RttIdleP99,
            "p99",
        ),
        Plot::up_to(
            "Round trip beside TCP down",
            Metric::RttDownP50,
            Metric::RttDownP99,
            "p99",
        ),
        Plot::up_to(
            "Round trip beside TCP up",
            Metric::RttUpP50,
            Metric::RttUpP99,
            "p99",
        ),
        Plot::of("TCP down beside TCP up", Metric::TcpDownBoth),
        Plot::of("TCP up beside TCP down", Metric::TcpUpBoth),
        Plot::up_to(
            "Round trip beside both",
            Metric::RttBothP50,
            Metric::RttBothP99,
            "p99",
        ),
        Plot::of("Fairness of 8 TCP streams down", Metric::FairDown),
        Plot::of("Fairness of 8 TCP streams up", Metric::FairUp),
        Plot::of("Request and response, idle, p99", Metric::RequestIdleP99),
        Plot::of(
            "Request beside 8 TCP streams down, p99",
            Metric::RequestDownP99,
        ),
        Plot::of("Request beside 8 TCP streams up, p99", Metric::RequestUpP99),
        Plot::of("Start of the client to first reply", Metric::ConnectMs),
        Plot::up_to(
            "Memory of the client",
            Metric::RssClientIdle,
            Metric::RssClientPeak,
            "peak",
        ),
        Plot::up_to(
            "Memory of the server",
            Metric::RssServerIdle,
            Metric::RssServerPeak,
            "peak",
        ),
    ];

    /// Those that say the most.
    pub const FEW: [Plot; 4] = [Plot::ALL[0], Plot::ALL[1], Plot::ALL[4], Plot::ALL[13]];

    /// Draws it; `None` where nothing was measured.
    #[must_use]
    pub fn draw(self, figures: &Figures) -> Option<String> {
        let (body, height) = self.body(figures)?;
        Some(format!(
            "<svg class=\"plot\" role=\"img\" aria-label=\"{}\" viewBox=\"0 0 {WIDTH} {height}\">{body}</svg>",
            self.title
        ))
    }

    /// Everything inside of the `svg` element, and its height.
    fn body(self, figures: &Figures) -> Option<(String, f64)> {
        let rows: Vec<Row> = figures
            .measured()
            .filter_map(|system| self.row(figures, system))
            .collect();
        let most = rows.iter().map(Row::reach).fold(0.0, f64::max);
        if rows.is_empty() || most <= 0.0 {
            return None;
        }
        let scale = |figure: f64| figure / most * BARS_WIDTH;
        let mut body = format!("<text class=\"title\" y=\"15\">{}</text>", self.title);
        let _ = write!(
            body,
            "<text class=\"soft\" y=\"34\">{}</text>",
            self.subtitle(&rows)
        );
        for (index, row) in rows.iter().enumerate() {
            let top = HEAD_HEIGHT + ROW_HEIGHT * index as f64;
            let (middle, bottom) = (top + BAR_HEIGHT / 2.0, top + BAR_HEIGHT);
            let width = scale(row.figure).max(BAR_WIDTH_MIN);
            let _ = write!(
                body,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                BARS_X - 8.0,
                middle + 4.5,
                row.system.title()
            );
            if let Some((beyond, _)) = row.beyond {
                let _ = write!(
                    body,
                    "<rect class=\"{} beyond\" x=\"{BARS_X}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{BAR_HEIGHT}\"/>",
                    row.class(),
                    scale(beyond).max(width)
                );
            }
            let _ = write!(
                body,
                "<rect class=\"{}\" x=\"{BARS_X}\" y=\"{top:.1}\" width=\"{width:.1}\" height=\"{BAR_HEIGHT}\"/>",
                row.class()
            );
            if row.beyond.is_none() && row.min < row.max {
                let (from, to) = (BARS_X + scale(row.min), BARS_X + scale(row.max));
                let _ = write!(
                    body,
                    "<path class=\"spread\" d=\"M{from:.1} {middle:.1}H{to:.1}M{from:.1} {0:.1}V{1:.1}M{to:.1} {0:.1}V{1:.1}\"/>",
                    top + 4.0,
                    bottom - 4.0
                );
            }
            let _ = write!(
                body,
                "<text x=\"{:.1}\" y=\"{:.1}\">{}<tspan class=\"soft\">{}</tspan></text>",
                BARS_X + scale(row.reach()) + 7.0,
                middle + 4.5,
                self.metric.text(row.figure),
                row.remark
            );
        }
        let height = HEAD_HEIGHT + ROW_HEIGHT * rows.len() as f64 + FOOT_HEIGHT;
        let _ = write!(
            body,
            "<path class=\"axis\" d=\"M{BARS_X} {:.1}V{:.1}\"/>",
            HEAD_HEIGHT - 5.0,
            height - FOOT_HEIGHT
        );
        Some((body, height))
    }

    fn subtitle(self, rows: &[Row]) -> String {
        let better = if self.metric.more_is_better() {
            "more"
        } else {
            "less"
        };
        let mut text = format!("{}, {better} is better", unit(self.metric));
        if let Some((_, name)) = self.beyond {
            let first = if name == "p99" { "median" } else { "idle" };
            let _ = write!(text, "; {first}, paler: {name}");
        }
        if rows.iter().any(|row| row.remark.contains('\u{d7}')) {
            text += "; \u{d7}: of no tunnel";
        }
        text
    }

    fn row(self, figures: &Figures, system: System) -> Option<Row> {
        let run = figures.run(self.metric, system)?;
        let beyond = self
            .beyond
            .and_then(|(metric, name)| Some((figures.run(metric, system)?.median, name)));
        let direct = figures
            .run(self.metric, System::Direct)
            .filter(|_| system != System::Direct)
            .map(|direct| run.median / direct.median)
            .filter(|ratio| ratio.is_finite());
        let mut remark = String::new();
        if let Some((figure, _)) = beyond {
            let _ = write!(remark, " \u{2026} {}", self.metric.text(figure));
        } else if let Some(ratio) = direct {
            let _ = write!(remark, " ({}\u{d7})", times(ratio));
        }
        Some(Row {
            system,
            figure: run.median,
            min: run.min,
            max: run.max,
            beyond,
            remark,
        })
    }
}

/// One bar.
struct Row {
    system: System,
    figure: f64,
    min: f64,
    max: f64,
    beyond: Option<(f64, &'static str)>,
    remark: String,
}

impl Row {
    /// How far to the right anything of it goes.
    fn reach(&self) -> f64 {
        match self.beyond {
            Some((beyond, _)) => beyond.max(self.figure),
            None => self.max.max(self.figure),
        }
    }

    fn class(&self) -> &'static str {
        match self.system {
            System::Direct => "direct",
            System::Ringtun => "ringtun",
            System::RingtunBaseline => "baseline",
            _ => "other",
        }
    }
}

/// A file with some plots, two in a row.
#[must_use]
pub fn sheet(figures: &Figures, plots: &[Plot]) -> String {
    let drawn: Vec<(String, f64)> = plots.iter().filter_map(|plot| plot.body(figures)).collect();
    let row_height = drawn.iter().map(|(_, height)| *height).fold(0.0, f64::max) + GAP / 2.0;
    let (width, height) = (
        WIDTH * 2.0 + GAP,
        row_height * drawn.len().div_ceil(2) as f64,
    );
    let mut svg = format!(
        "<svg class=\"plot\" xmlns=\"http://www.w3.org/2000/svg\" role=\"img\" viewBox=\"0 0 {width} {height}\" \
         width=\"{width}\" height=\"{height}\">\n<title>ringtun compared</title>\n<style>{STYLE}</style>\n"
    );
    for (index, (body, _)) in drawn.iter().enumerate() {
        let x = (index % 2) as f64 * (WIDTH + GAP);
        let y = (index / 2) as f64 * row_height;
        let _ = writeln!(svg, "<g transform=\"translate({x} {y})\">{body}</g>");
    }
    svg + "</svg>\n"
}

/// A unit as it is written by hand.
#[must_use]
pub fn unit(metric: Metric) -> &'static str {
    match metric.unit() {
        "us" => "\u{b5}s",
        "s/GB" => "CPU s per GB",
        unit => unit,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::bench::figures::tests::figures;

    #[test]
    fn every_metric_is_in_a_plot() {
        let drawn: BTreeSet<Metric> = Plot::ALL
            .iter()
            .flat_map(|plot| [Some(plot.metric), plot.beyond.map(|(metric, _)| metric)])
            .flatten()
            .collect();
        assert_eq!(drawn, BTreeSet::from(Metric::ALL));
    }

    #[test]
    fn bars_are_as_long_as_their_figures() {
        let svg = Plot::ALL[0].draw(&figures()).expect("figures");
        // The longest reaches to its maximum of 3000.
        for (class, figure) in [("direct", 2000.0), ("ringtun", 950.0), ("other", 100.0)] {
            let width = format!("{:.1}", figure / 3000.0 * BARS_WIDTH);
            let bar = svg
                .split("<rect")
                .find(|part| part.contains(&format!("\"{class}\"")));
            let bar = bar.unwrap_or_else(|| panic!("no bar of {class}"));
            assert!(bar.contains(&format!("width=\"{width}\"")), "{bar}");
        }
        assert!(
            svg.contains(">950<tspan class=\"soft\"> (0.47\u{d7})"),
            "{svg}"
        );
    }

    #[test]
    fn what_was_not_measured_is_not_drawn() {
        assert!(Plot::of("UDP", Metric::UdpUp64).draw(&figures()).is_none());
    }

    #[test]
    fn a_sheet_stands_alone() {
        let sheet = sheet(&figures(), &Plot::FEW);
        assert!(sheet.starts_with("<svg") && sheet.ends_with("</svg>\n"));
        assert_eq!(sheet.matches("<g ").count(), sheet.matches("</g>").count());
        let outside = sheet.replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
        assert!(
            !outside.contains("http") && !outside.contains("url("),
            "{outside}"
        );
    }
}
