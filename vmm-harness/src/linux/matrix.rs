//! Every kernel with every script on both devices, and where the two devices differ.

use std::fmt::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::{DeviceKind, KernelSeries, LinuxError, LinuxOptions, LinuxStep, Progress, Script};
use crate::demo::size;

/// What to run.
#[derive(Debug)]
pub struct MatrixOptions<'a> {
    /// Where artefacts are kept.
    pub cache: &'a Path,
    /// Kernels.
    pub kernels: &'a [KernelSeries],
    /// Scripts.
    pub scripts: &'a [&'static Script],
    /// Devices. QEMU's is left out of scripts it cannot run.
    pub devices: &'a [DeviceKind],
    /// Seed of what is random.
    pub seed: u64,
    /// How long random resizing goes on.
    pub random_for: Duration,
}

/// One script on one kernel with one device.
#[derive(Debug, Serialize)]
pub struct MatrixRun {
    /// Series of the kernel.
    pub kernel: &'static str,
    /// Name of the script.
    pub script: &'static str,
    /// The device.
    pub device: DeviceKind,
    /// Packages and their versions; none if they could not be had.
    pub versions: Vec<String>,
    /// The steps up to its end, or up to what went wrong.
    pub steps: Vec<LinuxStep>,
    /// What went wrong.
    pub error: Option<String>,
    /// Seconds from before the boot.
    pub seconds: f64,
}

/// All runs so far.
#[derive(Debug, Default, Serialize)]
pub struct Matrix {
    runs: Vec<MatrixRun>,
}

/// Runs all of it, whatever fails, and calls `show` after each run; the last one is new.
///
/// # Errors
///
/// If it is interrupted, or kernel and QEMU are not to be had. What a script finds is in the matrix.
pub fn run_matrix(
    options: &MatrixOptions<'_>,
    progress: &mut Progress,
    show: &mut dyn FnMut(&Matrix) -> Result<(), LinuxError>,
) -> Result<Matrix, LinuxError> {
    let mut matrix = Matrix::default();
    for &device in options.devices {
        for &kernel in options.kernels {
            for &script in options.scripts {
                if device != DeviceKind::Ours && script.needs_ours() {
                    continue;
                }
                let run = LinuxOptions {
                    cache: options.cache,
                    kernel,
                    device,
                    seed: options.seed,
                    random_for: options.random_for,
                };
                matrix.runs.push(one(&run, script, progress)?);
                show(&matrix)?;
            }
        }
    }
    Ok(matrix)
}

fn one(
    options: &LinuxOptions<'_>,
    script: &'static Script,
    progress: &mut Progress,
) -> Result<MatrixRun, LinuxError> {
    let (kernel, script_name) = (options.kernel.version(), script.name());
    progress.note(&format!(
        "--- {script_name} on Linux {kernel}, {}",
        options.device.label()
    ));
    let begun = Instant::now();
    let mut steps = Vec::new();
    let result = super::run_script(options, script, progress, &mut |step| {
        steps.push(step.clone());
    });
    let (versions, error) = match result {
        Ok(run) => (run.versions, None),
        Err(error) if matches!(error, LinuxError::Interrupted) || error.is_about_packages() => {
            return Err(error);
        }
        Err(error) => (Vec::new(), Some(error.to_string())),
    };
    Ok(MatrixRun {
        kernel,
        script: script_name,
        device: options.device,
        versions,
        steps,
        error,
        seconds: begun.elapsed().as_secs_f64(),
    })
}

/// What device and guest make of a step, without what the host and its clock make of it.
fn facts(step: &LinuxStep) -> String {
    format!(
        "{}: requested {}, plugged {}, MemTotal +{} KiB, {} memory blocks, System RAM {}",
        step.what,
        size(step.requested),
        size(step.plugged),
        step.mem_total >> 10,
        step.memory_blocks,
        size(step.system_ram)
    )
}

/// Where two runs of a script differ: a line for each settled step that is not the same with both devices.
#[must_use]
pub fn differences(ours: &[LinuxStep], reference: &[LinuxStep]) -> Vec<String> {
    let settled = |steps: &[LinuxStep]| -> Vec<String> {
        steps
            .iter()
            .filter(|step| step.settled)
            .map(facts)
            .collect()
    };
    let (ours, reference) = (settled(ours), settled(reference));
    let missing = || "no such step".to_owned();
    (0..ours.len().max(reference.len()))
        .filter(|&index| ours.get(index) != reference.get(index))
        .map(|index| {
            let step = |steps: &[String]| steps.get(index).cloned().unwrap_or_else(missing);
            format!("{}; with QEMU's device {}", step(&ours), step(&reference))
        })
        .collect()
}

impl Matrix {
    /// All runs, in their order.
    #[must_use]
    pub fn runs(&self) -> &[MatrixRun] {
        &self.runs
    }

    /// Whether every check of every run held, and both devices agree wherever both were run.
    #[must_use]
    pub fn is_green(&self) -> bool {
        self.runs.iter().all(|run| {
            run.error.is_none() && self.differences(run).is_none_or(|lines| lines.is_empty())
        })
    }

    fn find(&self, kernel: &str, script: &str, device: DeviceKind) -> Option<&MatrixRun> {
        let mut runs = self.runs.iter();
        runs.find(|run| (run.kernel, run.script, run.device) == (kernel, script, device))
    }

    /// Where a run and that of the other device differ; `None` unless both have come to their end.
    fn differences(&self, run: &MatrixRun) -> Option<Vec<String>> {
        let ended = |device| {
            let run = self.find(run.kernel, run.script, device)?;
            run.error.is_none().then_some(run.steps.as_slice())
        };
        Some(differences(
            ended(DeviceKind::Ours)?,
            ended(DeviceKind::Qemu)?,
        ))
    }

    /// A run in a line.
    #[must_use]
    pub fn line(&self, run: &MatrixRun) -> String {
        let mut line = format!(
            "{:>5} {:<18} {:<5} {:>6.1} s  ",
            run.kernel,
            run.script,
            run.device.label(),
            run.seconds
        );
        match (&run.error, self.differences(run)) {
            (Some(error), _) => line += &format!("FAILED: {error}"),
            (None, Some(lines)) if lines.is_empty() => line += "ok, the same with both devices",
            (None, Some(lines)) => line += &format!("ok, differs: {}", lines.join("\n    ")),
            (None, None) => line += "ok",
        }
        line
    }

    /// Scripts and kernels as a table.
    #[must_use]
    pub fn table(&self) -> String {
        let kernels = self.distinct(|run| run.kernel);
        let mut text = format!("| script | {} |\n|---|", kernels.join(" | "));
        text += &"---|".repeat(kernels.len());
        for script in self.distinct(|run| run.script) {
            let _ = write!(text, "\n| {script} |");
            for kernel in &kernels {
                let _ = write!(text, " {} |", self.cell(kernel, script));
            }
        }
        text + "\n"
    }

    fn cell(&self, kernel: &str, script: &str) -> String {
        let verdict = |device| {
            let run = self.find(kernel, script, device)?;
            let verdict = if run.error.is_none() { "ok" } else { "FAILED" };
            Some((run, format!("{verdict} {:.0} s", run.seconds)))
        };
        let mut cell = match verdict(DeviceKind::Ours) {
            Some((_, text)) => text,
            None => "not run".into(),
        };
        if let Some((run, text)) = verdict(DeviceKind::Qemu) {
            let same = match self.differences(run) {
                Some(lines) if lines.is_empty() => ", the same",
                Some(_) => ", **differs**",
                None => "",
            };
            cell += &format!(" (QEMU's: {text}{same})");
        }
        cell
    }

    /// Everything in Markdown, with date and machine.
    #[must_use]
    pub fn markdown(&self, options: &MatrixOptions<'_>) -> String {
        let mut versions: Vec<_> = self.runs.iter().flat_map(|run| &run.versions).collect();
        versions.sort();
        versions.dedup();
        let mut text = format!("- {}\n", super::host::date_and_machine());
        for version in versions {
            let _ = writeln!(text, "- {version}");
        }
        let (seed, seconds) = (options.seed, options.random_for.as_secs());
        let _ = writeln!(
            text,
            "- VMEM_SEED={seed}, random resizing for {seconds} s\n\n{}",
            self.table()
        );
        let failed = self
            .runs
            .iter()
            .filter_map(|run| Some((run, run.error.as_ref()?)));
        for (run, error) in failed {
            let (kernel, script, device) = (run.kernel, run.script, run.device.label());
            let _ = writeln!(
                text,
                "FAILED: {script}, Linux {kernel}, {device}: `{error}`\n"
            );
        }
        let ours = |run: &&MatrixRun| run.device == DeviceKind::Ours;
        for run in self.runs.iter().filter(ours) {
            for line in self.differences(run).unwrap_or_default() {
                let _ = writeln!(
                    text,
                    "Differs, {}, Linux {}: {line}\n",
                    run.script, run.kernel
                );
            }
        }
        text += "Seconds until host, device and guest agreed, this device and QEMU's:\n\n";
        let kernels = self.distinct(|run| run.kernel);
        let _ = writeln!(text, "| script | step | {} |", kernels.join(" | "));
        let _ = writeln!(text, "|---|---|{}", "---|".repeat(kernels.len()));
        for script in self.distinct(|run| run.script) {
            self.steps_markdown(&mut text, script, &kernels);
        }
        text
    }

    /// A row for each settled step of a script.
    fn steps_markdown(&self, text: &mut String, script: &str, kernels: &[&str]) {
        let settled = |kernel, device| -> Vec<&LinuxStep> {
            let run = self.find(kernel, script, device);
            run.into_iter()
                .flat_map(|run| &run.steps)
                .filter(|step| step.settled)
                .collect()
        };
        let columns: Vec<_> = kernels
            .iter()
            .map(|kernel| {
                [DeviceKind::Ours, DeviceKind::Qemu].map(|device| settled(kernel, device))
            })
            .collect();
        let longest = columns.iter().flatten().max_by_key(|steps| steps.len());
        for (index, step) in longest.into_iter().flatten().enumerate() {
            let _ = write!(text, "| {script} | {} |", step.what);
            for column in &columns {
                let [ours, reference] = column.each_ref().map(|steps| {
                    let seconds = steps.get(index).map(|step| format!("{:.1}", step.seconds));
                    seconds.unwrap_or_else(|| "–".into())
                });
                let _ = write!(text, " {ours}, {reference} |");
            }
            text.push('\n');
        }
    }

    fn distinct(&self, of: impl Fn(&MatrixRun) -> &'static str) -> Vec<&'static str> {
        let mut found = Vec::new();
        for run in &self.runs {
            let value = of(run);
            if !found.contains(&value) {
                found.push(value);
            }
        }
        found
    }
}

/// Before and after the generated part of a document.
const BEGIN: &str = "<!-- begin: vmem linux --matrix -->\n";
const END: &str = "<!-- end: vmem linux --matrix -->\n";

/// `document` with `generated` in the place of what was between its marks; `None` if it has no marks.
#[must_use]
pub fn replace_generated(document: &str, generated: &str) -> Option<String> {
    let (before, rest) = document.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!(
        "{before}{BEGIN}\n{}\n\n{END}{after}",
        generated.trim()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(what: &str, settled: bool, plugged: u64) -> LinuxStep {
        LinuxStep {
            what: what.into(),
            settled,
            requested: plugged,
            plugged,
            mem_total: plugged,
            memory_blocks: 1,
            system_ram: 128 << 20,
            resident: 0,
            seconds: 1.0,
        }
    }

    fn run(device: DeviceKind, steps: Vec<LinuxStep>, error: Option<&str>) -> MatrixRun {
        MatrixRun {
            kernel: "6.12",
            script: "sub-block",
            device,
            versions: vec!["linux-image 1".into()],
            steps,
            error: error.map(str::to_owned),
            seconds: 12.0,
        }
    }

    #[test]
    fn settled_steps_are_compared_and_each_fact_counts() {
        let steps = [step("a", true, 6 << 20), step("b", false, 8 << 20)];
        assert_eq!(differences(&steps, &steps), Vec::<String>::new());
        assert_eq!(differences(&steps, &steps[..1]), Vec::<String>::new());
        let change = |change: fn(&mut LinuxStep)| {
            let mut other = steps.clone();
            change(&mut other[0]);
            differences(&steps, &other).len()
        };
        assert_eq!(change(|step| step.seconds = 2.0), 0);
        assert_eq!(change(|step| step.resident = 2), 0);
        assert_eq!(change(|step| step.what = "c".into()), 1);
        assert_eq!(change(|step| step.requested = 0), 1);
        assert_eq!(change(|step| step.plugged = 0), 1);
        assert_eq!(change(|step| step.mem_total -= 4096), 1);
        assert_eq!(change(|step| step.memory_blocks = 2), 1);
        assert_eq!(change(|step| step.system_ram = 0), 1);
        assert_eq!(differences(&steps, &[]).len(), 1);
    }

    #[test]
    fn the_table_tells_ok_failed_and_differing_apart() {
        let steps = || vec![step("a", true, 6 << 20)];
        let with = |runs| Matrix { runs };
        let ours = || run(DeviceKind::Ours, steps(), None);
        let alone = with(vec![ours()]);
        assert!(alone.is_green());
        assert!(alone.table().ends_with("| sub-block | ok 12 s |\n"));

        let same = with(vec![ours(), run(DeviceKind::Qemu, steps(), None)]);
        assert!(same.is_green());
        assert!(same.table().contains("ok 12 s (QEMU's: ok 12 s, the same)"));

        let other = vec![step("a", true, 8 << 20)];
        let differs = with(vec![ours(), run(DeviceKind::Qemu, other, None)]);
        assert!(!differs.is_green());
        assert!(differs.table().contains("**differs**"));
        let text = differs.markdown(&MatrixOptions {
            cache: Path::new(""),
            kernels: &[],
            scripts: &[],
            devices: &[],
            seed: 7,
            random_for: Duration::from_secs(60),
        });
        assert!(text.contains("Differs, sub-block, Linux 6.12: a: requested 6 MiB"));
        assert!(text.contains("- linux-image 1\n- VMEM_SEED=7, random resizing for 60 s\n"));
        assert!(text.contains("| sub-block | a | 1.0, 1.0 |"));

        let failed = with(vec![run(DeviceKind::Ours, steps(), Some("no"))]);
        assert!(!failed.is_green());
        assert!(failed.table().contains("| FAILED 12 s |"));
        assert!(failed.line(&failed.runs()[0]).ends_with("FAILED: no"));
    }

    #[test]
    fn only_what_is_between_the_marks_is_replaced() {
        let document = format!("before\n{BEGIN}old\n{END}after\n");
        let new = replace_generated(&document, "new\n").unwrap();
        assert_eq!(new, format!("before\n{BEGIN}\nnew\n\n{END}after\n"));
        assert_eq!(replace_generated(&new, "new").unwrap(), new);
        assert_eq!(replace_generated("no marks", "new"), None);
    }
}
