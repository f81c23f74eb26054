//! The plots of a report: data in, a figure of HTML out.

use virtio_mem_wire::{Answer, RequestKind};

use super::svg::{Axis, Chart, escape, number};
use super::{Held, Recording, Sample, Vm};
use crate::demo::size;
use crate::stress::{Latency, RECENT};

/// Width of what has the page to itself.
const WIDTH: f64 = 860.0;

/// Points of a rate over time.
const BINS: usize = 200;

/// The lines of memory over time, in the order of [`Sample::SIZES`]: class and legend. What is requested, plugged and
/// online stays what it is until it changes, so these lines go in steps.
const MEMORY: [(&str, &str); 4] = [
    ("requested", "requested"),
    ("plugged", "plugged at the most"),
    ("online", "online in the guest"),
    ("resident", "resident on the host"),
];

/// Shades of guests that are on top of each other.
const SHADES: usize = 4;

/// Guests a legend has room for.
const NAMED: usize = 8;

/// Something that goes on all the time.
struct Rate {
    class: &'static str,
    title: &'static str,
    unit: &'static str,
    /// Its running total.
    total: fn(&Sample) -> u64,
}

const RATES: [Rate; 3] = [
    Rate {
        class: "moved",
        title: "Blocks plugged and unplugged",
        unit: "blocks/s",
        total: |sample| sample.blocks_plugged + sample.blocks_unplugged,
    },
    Rate {
        class: "verified",
        title: "Pages verified",
        unit: "pages/s",
        total: |sample| sample.pages_verified,
    },
    Rate {
        class: "resizes",
        title: "Sizes asked for",
        unit: "resizes/s",
        total: |sample| sample.resizes,
    },
];

/// A drawing with its title, what its lines are, and what else is to be known about it.
fn figure(id: &str, title: &str, legend: &[(&str, &str)], note: &str, chart: Chart) -> String {
    let keys: String = legend
        .iter()
        .map(|(class, text)| format!("<span class=\"key {class}\">{}</span> ", escape(text)))
        .collect();
    let note = match note {
        "" => String::new(),
        note => format!("<p>{}</p>", escape(note)),
    };
    format!(
        "<figure id=\"{id}\"><figcaption><h3>{}</h3> {keys}{note}</figcaption>\n\
         <div class=\"plot\">{}</div></figure>\n",
        escape(title),
        chart.finish()
    )
}

fn title(what: &str, vm: usize, count: usize) -> String {
    match count {
        1 => what.to_owned(),
        _ => format!("{what}, guest {vm}"),
    }
}

/// What changes over time.
pub(super) fn over_time(recording: &Recording) -> String {
    let plots = OverTime {
        recording,
        seconds: recording.summary.seconds,
    };
    let mut html = String::new();
    if recording.vms.len() > 1 {
        html += &plots.held();
    }
    for (index, vm) in recording.vms.iter().enumerate() {
        html += &plots.memory(vm, index);
        html += &plots.blocks(vm, index);
    }
    for rate in &RATES {
        html += &plots.throughput(rate);
    }
    html
}

/// How long requests took.
pub(super) fn requests(recording: &Recording) -> String {
    let mut html = "<div class=\"pair\">\n".to_owned();
    for kind in RequestKind::ALL {
        for answer in Answer::ALL {
            let named = |l: &&Latency| (l.request, l.answer) == (kind.name(), answer.name());
            if let Some(latency) = recording.summary.requests.iter().find(named) {
                html += &latencies(latency);
            }
        }
    }
    html + "</div>\n"
}

/// Plots with the same time axis.
struct OverTime<'a> {
    recording: &'a Recording,
    seconds: f64,
}

impl OverTime<'_> {
    fn chart(&self, name: &str, y: Axis, height: f64) -> Chart {
        Chart::new(name, Axis::time(self.seconds), y, (WIDTH, height))
    }

    /// Marks the failure, if there was one, and if it was guest `vm`'s or no guest is named.
    fn mark_failure(&self, chart: &mut Chart, vm: Option<usize>) {
        if let Some(failure) = &self.recording.failure
            && vm.is_none_or(|vm| failure.vm.is_none_or(|failing| vm == failing))
        {
            chart.up(
                "failure",
                failure.seconds,
                failure.check.unwrap_or("failure"),
            );
        }
    }

    /// Sizes of one guest; its axis is that of its blocks.
    fn memory(&self, vm: &Vm, index: usize) -> String {
        let title = title("Memory", index, self.recording.vms.len());
        let sizes = vm
            .samples
            .iter()
            .flat_map(|sample| Sample::SIZES.map(|size| size(sample)));
        let most = sizes.max().unwrap_or(0);
        let y = Axis::bytes("bytes", most.max(self.recording.run.options.region));
        let mut chart = self.chart(&title, y, 300.0);
        for ((class, _), size) in MEMORY.into_iter().zip(Sample::SIZES) {
            let point = |sample: &Sample| (sample.seconds, size(sample) as f64);
            let points = vm.samples.iter().map(point);
            match class {
                "resident" => chart.line(class, points),
                _ => chart.line(class, steps(points)),
            }
        }
        chart.ticks("rest", false, increases(&vm.samples, |sample| sample.rests));
        chart.ticks("life", true, increases(&vm.samples, |sample| sample.lives));
        self.mark_failure(&mut chart, Some(index));
        let mut legend = MEMORY.to_vec();
        legend.extend([
            ("tick rest", "at rest, all checked"),
            ("tick life", "a guest started"),
        ]);
        figure(
            &format!("memory-{index}"),
            &title,
            &legend,
            &drawn(vm),
            chart,
        )
    }

    /// What is plugged of the region of one guest.
    fn blocks(&self, vm: &Vm, index: usize) -> String {
        let title = title("Blocks", index, self.recording.vms.len());
        let region_size = self.recording.run.options.region;
        let mut chart = self.chart(
            &title,
            Axis::bytes("offset in the region", region_size),
            300.0,
        );
        for shade in b'1'..=b'9' {
            // Nothing is known of what came after the last look.
            let areas = vm.maps.windows(2).flat_map(|looks| {
                let [map, next] = [&looks[0], &looks[1]];
                let shares = map.shares.as_bytes();
                let height = region_size as f64 / shares.len().max(1) as f64;
                let mut first = 0;
                let runs = shares.chunk_by(|a, b| a == b).filter_map(move |run| {
                    let from = first;
                    first += run.len();
                    (run.first() == Some(&shade)).then_some((from, first))
                });
                runs.map(move |(from, to)| {
                    let y = |share: usize| share as f64 * height;
                    ((map.seconds, y(from)), (next.seconds, y(to)))
                })
            });
            chart.areas(&format!("share s{}", char::from(shade)), areas);
        }
        self.mark_failure(&mut chart, Some(index));
        let legend = [
            ("share s9", "plugged"),
            ("share s6", "most plugged"),
            ("share s3", "some plugged"),
            ("share s0", "not plugged"),
        ];
        let note = match vm.stride {
            1 => String::new(),
            stride => format!(
                "Drawn are the last {RECENT} looks, and of each {stride} before them the first."
            ),
        };
        figure(&format!("blocks-{index}"), &title, &legend, &note, chart)
    }

    /// What the guests hold of the budget, on top of each other. Unlike samples of several guests, these are sums of
    /// one moment.
    fn held(&self) -> String {
        let Recording { run, vms, held, .. } = self.recording;
        let sums = held.iter().map(Held::sum);
        let most = sums.max().unwrap_or(0).max(run.options.budget.unwrap_or(0));
        let name = "Memory of all guests";
        // With room for what is written above the budget.
        let mut chart = self.chart(
            name,
            Axis::bytes("bytes", most.saturating_add(most / 16)),
            220.0,
        );
        let mut legend = Vec::new();
        for vm in 0..vms.len() {
            let class = format!("held h{}", vm % SHADES);
            let point = |held: &Held| {
                let below: u64 = held.bytes.iter().take(vm).sum();
                let own = held.bytes.get(vm).copied().unwrap_or(0);
                (below as f64, (below + own) as f64)
            };
            let mut points: Vec<(f64, f64, f64)> = Vec::new();
            for held in held {
                let (low, high) = point(held);
                if let Some((_, low, high)) = points.last().copied() {
                    points.push((held.seconds, low, high));
                }
                points.push((held.seconds, low, high));
            }
            if let Some((_, low, high)) = points.last().copied() {
                points.push((self.seconds, low, high));
            }
            chart.band(&class, &points);
            legend.push((class, format!("guest {vm}")));
        }
        if let Some(budget) = run.options.budget {
            chart.across("budget", budget as f64, &format!("budget {}", size(budget)));
        }
        self.mark_failure(&mut chart, None);
        let legend: Vec<_> = legend
            .iter()
            .map(|(class, text)| (class.as_str(), text.as_str()))
            .collect();
        let legend = if legend.len() > NAMED {
            &[]
        } else {
            legend.as_slice()
        };
        let note = "What each guest may come to have plugged, the larger of requested and plugged, guest 0 lowest: of all at \
                    the same moment. Where there is no room for every change, the most and the least of all together stay.";
        figure("memory-all", name, legend, note, chart)
    }

    fn throughput(&self, plotted: &Rate) -> String {
        let points = rate(&self.recording.vms, self.seconds, plotted.total);
        let most = points.iter().map(|(_, rate)| *rate).fold(0.0, f64::max);
        let (title, y) = (plotted.title, Axis::count(plotted.unit, most));
        let mut chart = self.chart(title, y, 170.0);
        chart.line(plotted.class, points.into_iter());
        self.mark_failure(&mut chart, None);
        figure(&format!("rate-{}", plotted.class), title, &[], "", chart)
    }
}

/// How much of what was seen of a guest is drawn.
fn drawn(vm: &Vm) -> String {
    let looked = format!(
        "Looked at {} times, {} apart at the most",
        vm.looks,
        duration(vm.longest_gap * 1e6)
    );
    match vm.stride {
        1 => format!("{looked}; all looks are drawn."),
        stride => format!(
            "{looked}. Drawn are the last {RECENT} looks, and of each {stride} before them the last and those at which \
             one of the sizes was least or most."
        ),
    }
}

/// When a count was seen to have grown.
fn increases(samples: &[Sample], count: fn(&Sample) -> u64) -> impl Iterator<Item = f64> {
    let mut last = 0;
    samples.iter().filter_map(move |sample| {
        let before = std::mem::replace(&mut last, count(sample));
        (last > before).then_some(sample.seconds)
    })
}

/// Each point, and below or above each but the first where the line was until then.
fn steps(points: impl Iterator<Item = (f64, f64)>) -> impl Iterator<Item = (f64, f64)> {
    let mut last = None;
    points.flat_map(move |(x, y)| {
        let corner = last.replace(y).map(|before| (x, before));
        corner.into_iter().chain([(x, y)])
    })
}

/// A running total at a time between samples.
fn at(samples: &[Sample], seconds: f64, value: impl Fn(&Sample) -> u64) -> f64 {
    let next = samples.partition_point(|sample| sample.seconds <= seconds);
    let before = match next {
        0 => Sample::default(),
        next => samples[next - 1],
    };
    let last = value(&before) as f64;
    samples.get(next).map_or(last, |after| {
        let share = (seconds - before.seconds) / (after.seconds - before.seconds);
        last + (value(after) as f64 - last) * share
    })
}

/// How fast a running total of all guests grows, as points in equal distances.
fn rate(vms: &[Vm], seconds: f64, value: impl Fn(&Sample) -> u64) -> Vec<(f64, f64)> {
    let samples = vms.iter().map(|vm| vm.samples.len()).max().unwrap_or(0);
    let bins = samples.clamp(1, BINS);
    let width = seconds / bins as f64;
    let total = |edge: usize| -> f64 {
        let time = edge as f64 * width;
        vms.iter().map(|vm| at(&vm.samples, time, &value)).sum()
    };
    (0..bins)
        .map(|bin| {
            let grown = total(bin + 1) - total(bin);
            ((bin as f64 + 0.5) * width, (grown / width).max(0.0))
        })
        .collect()
}

/// How many requests took how long, both in powers: a stall of a second is as visible as a thousand of 10 µs.
fn latencies(latency: &Latency) -> String {
    let filled = || {
        latency
            .buckets
            .iter()
            .enumerate()
            .filter(|(_, count)| **count > 0)
    };
    // Bucket i ends at 2^i ns.
    let log10 = |bucket: f64| bucket * 2f64.log10();
    let first = filled().next().map_or(0, |(bucket, _)| bucket);
    let last = filled().next_back().map_or(1, |(bucket, _)| bucket);
    let min = log10(first as f64 - 1.0).max(0.0).floor() as i32;
    let max = log10(last as f64).ceil() as i32;
    let most = filled().map(|(_, count)| *count).max().unwrap_or(1);
    let x = Axis::decades("time", min, max, time_text);
    let counts = (most as f64).log10().ceil() as i32;
    let y = Axis::decades("requests", 0, counts, |ten| number(10f64.powi(ten))).from(-0.3);
    let name = format!("{} → {}", latency.request, latency.answer);
    let mut chart = Chart::new(&name, x, y, (WIDTH / 2.0, 200.0));
    let bars = filled().map(|(bucket, count)| {
        let from = log10(bucket as f64 - 1.0).max(f64::from(min));
        let to = log10(bucket as f64).max(from);
        ((from, -0.3), (to, (*count as f64).log10()))
    });
    chart.areas(&format!("bar {}", latency.answer), bars);
    let p99 = latency.percentile(99).as_secs_f64() * 1e6;
    let title = format!(
        "{name}: {}, mean {}, 99 % below {}, longest {}",
        latency.count,
        duration(latency.mean_us),
        duration(p99),
        duration(latency.max_us)
    );
    let id = format!("latency-{}-{}", latency.request, latency.answer);
    figure(&id, &title, &[], "", chart)
}

/// Microseconds, with three digits.
fn duration(us: f64) -> String {
    let (value, unit) = match us {
        us if us < 1e3 => (us, "µs"),
        us if us < 1e6 => (us / 1e3, "ms"),
        us => (us / 1e6, "s"),
    };
    let digits = match value {
        v if v < 10.0 => 2,
        v if v < 100.0 => 1,
        _ => 0,
    };
    format!("{value:.digits$} {unit}")
}

/// 10^`ten` ns.
fn time_text(ten: i32) -> String {
    let (unit, of) = match ten {
        ..3 => ("ns", 0),
        3..6 => ("µs", 3),
        6..9 => ("ms", 6),
        9.. => ("s", 9),
    };
    format!("{} {unit}", 10f64.powi(ten - of))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(seconds: f64, total: u64) -> Sample {
        Sample {
            seconds,
            resizes: total,
            ..Sample::default()
        }
    }

    #[test]
    fn a_rate_is_the_slope_of_all_guests_together() {
        let vm = |slope: u64| Vm {
            samples: (1..=100)
                .map(|i| sample(i as f64 / 10.0, i * slope))
                .collect(),
            ..Vm::default()
        };
        let points = rate(&[vm(1), vm(3)], 10.0, |sample| sample.resizes);
        assert_eq!(points.len(), 100);
        for (_, rate) in points {
            assert!((rate - 40.0).abs() < 1e-6, "{rate}");
        }
        assert_eq!(rate(&[], 10.0, |sample| sample.resizes), [(5.0, 0.0)]);
    }

    #[test]
    fn what_is_not_drawn_is_said() {
        let vm = |stride| Vm {
            looks: 9000,
            longest_gap: 0.0412,
            stride,
            ..Vm::default()
        };
        assert_eq!(
            drawn(&vm(1)),
            "Looked at 9000 times, 41.2 ms apart at the most; all looks are drawn."
        );
        assert_eq!(
            drawn(&vm(32)),
            "Looked at 9000 times, 41.2 ms apart at the most. Drawn are the last 200 looks, and of each 32 before them the last and those at which \
             one of the sizes was least or most."
        );
    }

    #[test]
    fn a_count_is_marked_where_it_has_grown() {
        let samples = [(1.0, 0), (2.0, 1), (3.0, 1), (4.0, 3)].map(|(s, n)| sample(s, n));
        let grown: Vec<_> = increases(&samples, |sample| sample.resizes).collect();
        assert_eq!(grown, [2.0, 4.0]);
    }

    #[test]
    fn steps_stay_until_they_change() {
        let line: Vec<_> = steps([(0.0, 1.0), (1.0, 2.0), (3.0, 0.0)].into_iter()).collect();
        assert_eq!(
            line,
            [(0.0, 1.0), (1.0, 1.0), (1.0, 2.0), (3.0, 2.0), (3.0, 0.0)]
        );
        assert_eq!(steps(std::iter::empty()).count(), 0);
    }

    #[test]
    fn durations_have_three_digits() {
        let texts = [0.123, 12.3, 134_041.0, 2_147_484.0].map(duration);
        assert_eq!(texts, ["0.12 µs", "12.3 µs", "134 ms", "2.15 s"]);
    }

    #[test]
    fn powers_of_ten_have_their_unit() {
        let texts: Vec<_> = [0, 2, 3, 5, 6, 9, 11].map(time_text).into();
        assert_eq!(
            texts,
            ["1 ns", "100 ns", "1 µs", "100 µs", "1 ms", "1 s", "100 s"]
        );
    }
}
