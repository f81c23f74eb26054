//! The page around the plots. It has no script and loads nothing.

use super::svg::escape;
use super::{Outcome, Recording, plots};
use crate::demo::size;

const STYLE: &str = include_str!("style.css");

/// Nothing but its own style, and an icon that is empty.
const POLICY: &str = "default-src 'none'; img-src data:; style-src 'unsafe-inline'";

pub(super) fn page(recording: &Recording) -> String {
    let (title, class) = match recording.outcome {
        Outcome::Passed => ("every check held", "passed"),
        Outcome::Failed => ("a check failed", "failed"),
        Outcome::Interrupted => ("ended early, every check held", "interrupted"),
    };
    let failure = recording.failure.as_ref().map_or(String::new(), |failure| {
        format!("<p class=\"failure\">{}</p>\n", escape(failure))
    });
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{POLICY}\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n<link rel=\"icon\" href=\"data:,\">\n\
         <title>vmem stress: {title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n\
         <h1>vmem stress <span class=\"{class}\">{title}</span></h1>\n{failure}\
         {}{}<h2>Over time</h2>\n{}<h2>Requests</h2>\n{}</body>\n</html>\n",
        facts(recording),
        totals(recording),
        plots::over_time(recording),
        plots::requests(recording),
    )
}

fn facts(recording: &Recording) -> String {
    let run = &recording.run;
    let pattern = format!("{:?}", run.pattern).to_lowercase();
    let region = format!(
        "{} in blocks of {}",
        size(run.region_size),
        size(run.block_size)
    );
    let budget = match run.budget {
        0 => "none".to_owned(),
        bytes => size(bytes),
    };
    let version = format!("vmem {}", run.version);
    let seed = run.seed.to_string();
    let rows = [
        ("command", run.command.as_str()),
        ("seed", &seed),
        ("began", &run.began),
        ("guests on", &run.backend),
        ("machine", &run.machine),
        ("pattern", &pattern),
        ("region", &region),
        ("budget", &budget),
        ("version", &version),
    ];
    let rows = rows.map(|(name, value)| format!("<dt>{name}</dt><dd>{}</dd>\n", escape(value)));
    format!("<dl>\n{}</dl>\n", rows.concat())
}

fn totals(recording: &Recording) -> String {
    let summary = &recording.summary;
    let mut cards = vec![
        ("seconds", format!("{:.1}", summary.seconds)),
        ("resizes", summary.resizes.to_string()),
        ("blocks plugged", summary.blocks_plugged.to_string()),
        ("blocks unplugged", summary.blocks_unplugged.to_string()),
        ("pages verified", summary.pages_verified.to_string()),
        ("pages moved", summary.pages_moved.to_string()),
        (
            "pages at most not movable",
            summary.most_unmovable.to_string(),
        ),
        ("checks at rest", summary.rests.to_string()),
        ("checks on the way", summary.observations.to_string()),
        ("guest lives", summary.lives.to_string()),
    ];
    if summary.rogues > 0 {
        cards.push(("rogues caught", summary.rogues.to_string()));
    }
    let list = |cards: Vec<(&str, String)>| {
        let cards = cards.into_iter();
        let cards: String = cards
            .map(|(name, value)| format!("<li><b>{value}</b> {name}</li>\n"))
            .collect();
        format!("<ul class=\"totals\">\n{cards}</ul>\n")
    };
    let mut html = list(cards);
    let faults = summary
        .faults
        .iter()
        .map(|fault| (fault.fault, fault.count.to_string()));
    let reasons = summary
        .reasons
        .iter()
        .map(|reason| (reason.reason.as_str(), reason.count.to_string()));
    for (title, counts) in [
        ("Faults", faults.collect::<Vec<_>>()),
        (
            "Looked at on the way to a size, and why it was not there",
            reasons.collect(),
        ),
    ] {
        if !counts.is_empty() {
            html += &format!("<h3>{title}</h3>\n{}", list(counts));
        }
    }
    html
}
