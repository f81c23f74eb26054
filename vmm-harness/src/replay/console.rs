//! The recorded scripts: the files they write, and what they print.

use virtio_mem_driver::hotplug::Error;

use super::guest::{Check, Guest, lock};
use super::shell::{self, Printed};
use super::step::Step;
use super::trace::PAGE_SIZE;

/// Where the module `memory-notifier-error-inject` has its files.
const ERROR_INJECTION: &str = "/sys/kernel/debug/notifier-error-inject/memory/actions/";

/// Smallest number that is an errno.
const LOWEST_ERRNO: i32 = -4095;

impl Guest {
    /// Runs a script.
    pub(super) fn shell(
        &mut self,
        script: &str,
        out: &str,
        step: &Step,
        checks: &mut Vec<Check>,
    ) -> Result<(), String> {
        // Once with nothing behind it, to learn which writes were recorded as failed.
        let rehearsed = shell::run(script, &mut |_, _| true).map_err(|error| error.to_string())?;
        let failed = failed_writes(&rehearsed, out);
        let (mut number, mut wrong) = (0, None);
        let printed = shell::run(script, &mut |file, text| {
            let recorded_failed = failed.contains(&number);
            number += 1;
            let result = self.shell_write(file, text, recorded_failed, step);
            result.unwrap_or_else(|what| {
                wrong.get_or_insert(what);
                false
            })
        })
        .map_err(|error| error.to_string())?;
        if let Some(what) = wrong {
            return Err(what);
        }
        // Other commands print, too: what `echo` prints must be there, in this order.
        let mut lines = out.lines();
        for expected in printed.into_iter().map(|line| line.text) {
            let found = lines.by_ref().any(|line| line == expected);
            checks.push(Check {
                subject: "shell".into(),
                field: "output",
                expected: if found {
                    expected.clone()
                } else {
                    format!("{expected:?} in {out:?}")
                },
                got: expected,
            });
        }
        let corrupted = out
            .lines()
            .rev()
            .find_map(|line| line.strip_prefix("HardwareCorrupted:"));
        checks.extend(corrupted.map(|recorded| Check {
            subject: "meminfo".into(),
            field: "HardwareCorrupted",
            expected: recorded.trim().to_owned(),
            got: format!(
                "{} kB",
                self.hotplug.hardware_corrupted_pages() * PAGE_SIZE / 1024
            ),
        }));
        Ok(())
    }

    /// `echo text > file`; whether that worked.
    fn shell_write(
        &mut self,
        file: &str,
        text: &str,
        recorded_failed: bool,
        step: &Step,
    ) -> Result<bool, String> {
        if let Some(file) = file.strip_prefix("/sys/devices/system/memory/") {
            if file.ends_with("_offline_page") && recorded_failed && self.in_kernel_zone(text) {
                // The page is in use, which only the kernel knows. A hard failure counts all the same.
                self.inputs.in_use += 1;
                if file == "hard_offline_page" {
                    let _counted = self.write(file, text, None);
                }
                return Ok(false);
            }
            // Taking a block offline has worked if it was heard of.
            let heard = file.split_once('/').is_none_or(|(block, _)| {
                step.uevents
                    .iter()
                    .any(|event| event.strip_prefix("offline ") == Some(block))
            });
            let errno = (!heard).then_some(Error::Busy);
            return Ok(self.write(file, text, errno).is_ok());
        }
        if let Some(name) = file.strip_prefix("/sys/module/memory_hotplug/parameters/") {
            let file = format!("parameters/{name}");
            return Ok(self.hotplug.write(&file, text).is_ok());
        }
        if let Some(worked) = self.write_driver_file(file, text) {
            return Ok(worked);
        }
        let Some((action, "error")) = file
            .strip_prefix(ERROR_INJECTION)
            .and_then(|rest| rest.split_once('/'))
        else {
            return Ok(true);
        };
        let Ok(number @ LOWEST_ERRNO..=0) = text.trim().parse::<i32>() else {
            return Ok(false);
        };
        let veto = match number {
            0 => None,
            errno => Some(
                Error::from_errno(-errno)
                    .ok_or_else(|| format!("the model has no errno {}", -errno))?,
            ),
        };
        let mut vetoes = lock(&self.vetoes);
        match action {
            "MEM_GOING_ONLINE" => vetoes.going_online = veto,
            "MEM_GOING_OFFLINE" => vetoes.going_offline = veto,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Whether an address, in the text of a program, is in memory that the kernel keeps its own pages in.
    fn in_kernel_zone(&self, address: &str) -> bool {
        let address = address.trim();
        let address = match address.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16),
            None => address.parse(),
        };
        address.is_ok_and(|address| {
            let block = address / self.block_size;
            let file = |name: &str| self.read(&format!("memory{block}/{name}"));
            file("state") == "online" && file("valid_zones") != "Movable"
        })
    }
}

/// The writes, by number, whose status was recorded as a failure, where it would have been printed.
fn failed_writes(printed: &[Printed], out: &str) -> Vec<usize> {
    let mut lines = out.lines();
    let mut failed = Vec::new();
    for line in printed {
        let as_failed = line.status_of.as_ref();
        let found = lines
            .by_ref()
            .find(|found| *found == line.text || as_failed.is_some_and(|(_, text)| *found == text));
        if let (Some(found), Some((write, text))) = (found, as_failed)
            && found == text
        {
            failed.push(*write);
        }
    }
    failed
}
