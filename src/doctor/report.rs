//! The checks and the verdict, as text for people and as JSON for programs.

use std::fmt::Write;

use serde::Serialize;

use super::Role;

const GREEN: &str = "\x1b[32m";
const YELLOW: &str = "\x1b[33m";
const RED: &str = "\x1b[31m";
const FAINT: &str = "\x1b[2m";
const PLAIN: &str = "\x1b[0m";

/// How well something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// It runs, but worse than it could.
    Degraded,
    /// It does not run, or no traffic gets through.
    Broken,
    /// Of no concern here, or not to be found out.
    #[serde(rename = "n/a")]
    NotApplicable,
}

impl Level {
    fn word(self) -> &'static str {
        match self {
            Level::Ok => "ok",
            Level::Degraded => "degraded",
            Level::Broken => "broken",
            Level::NotApplicable => "n/a",
        }
    }

    fn colour(self) -> &'static str {
        match self {
            Level::Ok => GREEN,
            Level::Degraded => YELLOW,
            Level::Broken => RED,
            Level::NotApplicable => FAINT,
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What; there may be several of the same name, one for each port for example.
    pub name: &'static str,
    /// Whom it concerns.
    pub roles: Vec<Role>,
    /// How it is.
    pub level: Level,
    /// What was found.
    pub found: String,
    /// What to do, as a command where there is one.
    pub fix: Option<String>,
}

/// All checks, and what follows from them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// This program's version.
    pub version: &'static str,
    /// The role that was asked for; `None`: both.
    pub role: Option<Role>,
    /// The roles that this host cannot run, of those asked for.
    pub cannot_run: Vec<Role>,
    /// All checks, in the order in which a start would stumble over them.
    pub checks: Vec<Check>,
}

impl Report {
    pub(super) fn new(role: Option<Role>, checks: Vec<Check>) -> Self {
        let cannot_run = asked(role)
            .into_iter()
            .filter(|role| {
                checks
                    .iter()
                    .any(|check| check.level == Level::Broken && check.roles.contains(role))
            })
            .collect();
        Report {
            version: env!("CARGO_PKG_VERSION"),
            role,
            cannot_run,
            checks,
        }
    }

    /// Whether every role that was asked for can run.
    pub fn can_run(&self) -> bool {
        self.cannot_run.is_empty()
    }

    /// One JSON document.
    pub fn json(&self) -> String {
        serde_json::to_string_pretty(self).expect("names and text only")
    }

    /// A line for each check, its fix below, and the verdict.
    pub fn text(&self, in_colour: bool) -> String {
        let paint = |level: Level, text: &str| {
            if in_colour {
                format!("{}{text}{PLAIN}", level.colour())
            } else {
                text.to_owned()
            }
        };
        let name_width = self.checks.iter().map(|check| check.name.len()).max();
        let name_width = name_width.unwrap_or(0);
        let level_width = Level::Degraded.word().len();
        let mut text = String::new();
        for check in &self.checks {
            let level = paint(check.level, &format!("{:level_width$}", check.level.word()));
            let role = match check.roles[..] {
                [role] if self.role.is_none() => format!("{}: ", role.name()),
                _ => String::new(),
            };
            let _ = writeln!(
                text,
                "{level}  {:name_width$}  {role}{}",
                check.name, check.found
            );
            if let Some(fix) = &check.fix {
                let indent = level_width + name_width + 4;
                let _ = writeln!(text, "{:indent$}fix: {fix}", "");
            }
        }
        let names = |roles: &[Role]| {
            let names: Vec<_> = roles.iter().map(|role| role.name()).collect();
            names.join(" and ")
        };
        let can: Vec<Role> = asked(self.role)
            .into_iter()
            .filter(|role| !self.cannot_run.contains(role))
            .collect();
        let mut verdict = Vec::new();
        if !can.is_empty() {
            verdict.push(paint(
                Level::Ok,
                &format!("this host can run ringtun as {}", names(&can)),
            ));
        }
        if !self.cannot_run.is_empty() {
            let roles = names(&self.cannot_run).replace(" and ", " or ");
            verdict.push(paint(
                Level::Broken,
                &format!("this host cannot run ringtun as {roles}"),
            ));
        }
        text.push_str(&verdict.join("; "));
        text.push('\n');
        text
    }
}

fn asked(role: Option<Role>) -> Vec<Role> {
    role.map_or(Role::ALL.into(), |role| vec![role])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &'static str, roles: &[Role], level: Level) -> Check {
        Check {
            name,
            roles: roles.into(),
            level,
            found: "something".into(),
            fix: (level != Level::Ok).then(|| "do it".into()),
        }
    }

    #[test]
    fn what_is_broken_for_one_role_does_not_concern_the_other() {
        let checks = vec![
            check("kernel", &Role::ALL, Level::Ok),
            check("nft", &[Role::Server], Level::Broken),
            check("bbr", &Role::ALL, Level::Degraded),
        ];
        let both = Report::new(None, checks.clone());
        assert_eq!(both.cannot_run, [Role::Server]);
        assert_eq!(
            both.text(false),
            "ok        kernel  something\n\
             broken    nft     server: something\n                  fix: do it\n\
             degraded  bbr     something\n                  fix: do it\n\
             this host can run ringtun as client; this host cannot run ringtun as server\n"
        );
        assert!(Report::new(Some(Role::Client), checks.clone()).can_run());
        assert!(!Report::new(Some(Role::Server), checks).can_run());
    }

    #[test]
    fn json_has_stable_names() {
        let report = Report::new(
            Some(Role::Client),
            vec![check("nft", &[Role::Server], Level::NotApplicable)],
        );
        let json: serde_json::Value = serde_json::from_str(&report.json()).expect("JSON");
        assert_eq!(json["role"], "client");
        assert_eq!(json["cannot_run"], serde_json::json!([]));
        assert_eq!(json["checks"][0]["level"], "n/a");
        assert_eq!(json["checks"][0]["roles"][0], "server");
    }
}
