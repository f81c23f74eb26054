//! The page around the plots. It has no script and loads nothing.

use std::time::Duration;

use super::svg::escape;
use super::{Options, Outcome, Recording, plots};
use crate::demo::size;

const STYLE: &str = include_str!("style.css");

/// Nothing but its own style, and an icon that is empty.
const POLICY: &str = "default-src 'none'; img-src data:; style-src 'unsafe-inline'";

pub(super) fn page(recording: &Recording) -> String {
    let (title, class) = match recording.outcome {
        Outcome::Passed => ("every check held", "passed"),
        Outcome::Failed
            if recording
                .failure
                .as_ref()
                .is_some_and(|failure| failure.check.is_none()) =>
        {
            ("something could not be done", "failed")
        }
        Outcome::Failed => ("a check failed", "failed"),
        Outcome::Interrupted => ("ended early, every check held", "interrupted"),
    };
    let failure = recording.failure.as_ref().map_or(String::new(), |failure| {
        format!(
            "<p class=\"failure\">after {:.1} s: {}</p>\n",
            failure.seconds,
            escape(&failure.message)
        )
    });
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{POLICY}\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n<link rel=\"icon\" href=\"data:,\">\n\
         <title>vmem stress: {title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n\
         <h1>vmem stress <span class=\"{class}\">{title}</span></h1>\n{failure}\
         {}{}{}<h2>Over time</h2>\n{}<h2>Requests</h2>\n{}</body>\n</html>\n",
        facts(recording),
        options(&recording.run.options),
        totals(recording),
        plots::over_time(recording),
        plots::requests(recording),
    )
}

fn facts(recording: &Recording) -> String {
    let run = &recording.run;
    let seed = run.seed.to_string();
    list(
        "facts",
        &[
            ("command", &run.command),
            ("seed", &seed),
            ("began", &run.began),
            ("guests on", &run.backend),
            ("machine", &run.machine),
            ("version", &format!("vmem {}", run.version)),
        ],
    )
}

/// What was asked for: in the words of the command line where it has some.
fn options(options: &Options) -> String {
    let seconds = |seconds: f64| match Duration::try_from_secs_f64(seconds) {
        Ok(duration) => humantime::format_duration(duration).to_string(),
        // Longer than there is a time for.
        Err(_) => "none".to_owned(),
    };
    let limit = match (options.seconds, options.resizes) {
        (Some(time), _) => seconds(time),
        (None, count) => format!("{} resizes", count.unwrap_or(0)),
    };
    let faults: Vec<_> = options.faults.iter().map(ToString::to_string).collect();
    let or = |text: Option<String>, other: &str| text.unwrap_or_else(|| other.to_owned());
    let node = options.node.map(|node| node.to_string());
    let mode = options.mode.map(str::to_owned);
    list(
        "options",
        &[
            ("limit", &limit),
            ("stuck after", &seconds(options.stuck_after)),
            ("pattern", &options.pattern.to_string()),
            ("workload", options.workload),
            (
                "faults",
                &or((!faults.is_empty()).then(|| faults.join(", ")), "none"),
            ),
            ("guests", &options.vms.to_string()),
            ("budget", &or(options.budget.map(size), "none")),
            ("run on", &options.guest.to_string()),
            ("vCPUs", &options.vcpus.to_string()),
            ("boot memory", &size(options.boot_memory)),
            ("region", &size(options.region)),
            ("block size", &size(options.block_size)),
            (
                "slot size",
                &or(options.slot_size.map(size), "the device's choice"),
            ),
            ("node", &or(node, "none")),
            ("backing", &options.backing.to_string()),
            ("policy", options.policy),
            ("mode", &or(mode, "the driver's choice")),
            (
                "big block",
                &or(options.bbm_block_size.map(size), "the driver's choice"),
            ),
        ],
    )
}

fn list(class: &str, rows: &[(&str, &str)]) -> String {
    let rows: String = rows
        .iter()
        .map(|(name, value)| format!("<div><dt>{name}</dt><dd>{}</dd></div>\n", escape(value)))
        .collect();
    format!("<dl class=\"{class}\">\n{rows}</dl>\n")
}

fn totals(recording: &Recording) -> String {
    let summary = &recording.summary;
    let cards = |counts: &mut dyn Iterator<Item = (String, String)>| -> String {
        counts
            .map(|(count, what)| format!("<li><b>{count}</b> {}</li>\n", escape(&what)))
            .collect()
    };
    let list = |cards: String| format!("<ul class=\"totals\">\n{cards}</ul>\n");
    let totals = summary.totals().into_iter();
    let mut html = list(cards(
        &mut totals.map(|(count, what)| (count, what.to_owned())),
    ));
    let faults = summary.faults.iter();
    let faults = cards(&mut faults.map(|fault| (fault.count.to_string(), fault.fault.to_string())));
    let reasons = summary.reasons.iter();
    let reasons =
        cards(&mut reasons.map(|reason| (reason.count.to_string(), reason.reason.clone())));
    for (title, counts) in [
        ("Faults", faults),
        (
            "Looked at on the way to a size, and why it was not there",
            reasons,
        ),
    ] {
        if !counts.is_empty() {
            html += &format!("<h3>{title}</h3>\n{}", list(counts));
        }
    }
    html
}
