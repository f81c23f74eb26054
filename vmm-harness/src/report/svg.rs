//! Axes, lines and areas as SVG. Colours are the page's: elements name a class.

use std::fmt::Write;

use crate::demo::size;

/// Room around the plot for its axes and half a mark, and above it for ticks.
const LEFT: f64 = 76.0;
const RIGHT: f64 = 28.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 40.0;

/// Height of a tick, and of one that is to be seen from afar.
const TICKS: (f64, f64) = (4.0, 9.0);

/// About how many marks an axis has.
const MARKS: f64 = 6.0;
const BYTE_MARKS: u64 = 6;

/// One direction of a chart: what is where, and what is written there.
#[derive(Clone, Debug)]
pub(super) struct Axis {
    title: String,
    min: f64,
    max: f64,
    /// Where and what.
    marks: Vec<(f64, String)>,
}

impl Axis {
    /// Numbers from 0 to a round one that is no less than `max`.
    pub(super) fn count(title: &str, max: f64) -> Self {
        let max = if max > 0.0 { max } else { 1.0 };
        let step = step(max);
        // A fraction more is not a step more: fractions are not exact.
        let steps = (max / step - 1e-9).ceil();
        Self::numbers(title, steps * step, step)
    }

    fn numbers(title: &str, max: f64, step: f64) -> Self {
        // The last one is there although fractions are not exact.
        let within = |value: &f64| *value <= max * (1.0 + 1e-9);
        let marks = (0..).map(|mark: u32| f64::from(mark) * step);
        Self {
            title: title.to_owned(),
            min: 0.0,
            max,
            marks: marks
                .take_while(within)
                .map(|value| (value, number(value)))
                .collect(),
        }
    }

    /// Bytes from 0 to a round number that is no less than `max`.
    pub(super) fn bytes(title: &str, max: u64) -> Self {
        let max = max.max(1);
        let step = max.div_ceil(BYTE_MARKS).next_power_of_two();
        let marks = (0..=max.div_ceil(step)).map(|mark| mark * step);
        Self {
            title: title.to_owned(),
            min: 0.0,
            max: max.next_multiple_of(step) as f64,
            marks: marks.map(|bytes| (bytes as f64, size(bytes))).collect(),
        }
    }

    /// Time from 0 to `seconds`, which need not be round.
    pub(super) fn time(seconds: f64) -> Self {
        let seconds = if seconds > 0.0 { seconds } else { 1.0 };
        match seconds > 300.0 {
            false => Self::numbers("time, s", seconds, step(seconds)),
            true => {
                let minutes = seconds / 60.0;
                let mut axis = Self::numbers("time, min", minutes, step(minutes));
                axis.max *= 60.0;
                axis.marks.iter_mut().for_each(|(at, _)| *at *= 60.0);
                axis
            }
        }
    }

    /// Powers of ten from 10^`min` to 10^`max`; values are their logarithms.
    pub(super) fn decades(title: &str, min: i32, max: i32, text: impl Fn(i32) -> String) -> Self {
        let max = max.max(min + 1);
        Self {
            title: title.to_owned(),
            min: f64::from(min),
            max: f64::from(max),
            marks: (min..=max)
                .map(|mark| (f64::from(mark), text(mark)))
                .collect(),
        }
    }

    /// Room below the smallest value, for what would have no height.
    pub(super) fn from(mut self, min: f64) -> Self {
        self.min = min;
        self
    }

    fn share(&self, value: f64) -> f64 {
        (value - self.min) / (self.max - self.min)
    }
}

/// A round distance of so many marks up to `max` as can be read.
fn step(max: f64) -> f64 {
    let raw = max / MARKS;
    let power = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 5.0].map(|digit| digit * power);
    let step = step.into_iter().find(|step| *step >= raw);
    step.unwrap_or(10.0 * power)
}

/// A number as people write it.
pub(super) fn number(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{}M", v / 1e6),
        v if v >= 1e3 => format!("{}k", v / 1e3),
        // No digits that are not there, nor those of binary fractions.
        v => format!("{}", (v * 1e6).round() / 1e6),
    }
}

/// A drawing that grows.
#[derive(Debug)]
pub(super) struct Chart {
    name: String,
    x: Axis,
    y: Axis,
    /// In units of its own; the page scales it.
    size: (f64, f64),
    body: String,
}

impl Chart {
    pub(super) fn new(name: &str, x: Axis, y: Axis, size: (f64, f64)) -> Self {
        Self {
            name: name.to_owned(),
            x,
            y,
            size,
            body: String::new(),
        }
    }

    fn at(&self, x: f64, y: f64) -> (f64, f64) {
        let (width, height) = (self.size.0 - LEFT - RIGHT, self.size.1 - TOP - BOTTOM);
        (
            LEFT + self.x.share(x) * width,
            TOP + (1.0 - self.y.share(y)) * height,
        )
    }

    fn add(&mut self, text: std::fmt::Arguments<'_>) {
        // A string takes everything.
        let _ = self.body.write_fmt(text);
    }

    /// A line through `points`, each of which is in it.
    pub(super) fn line(&mut self, class: &str, points: impl Iterator<Item = (f64, f64)>) {
        self.add(format_args!("<polyline class=\"line {class}\" points=\""));
        for (x, y) in points {
            let (x, y) = self.at(x, y);
            self.add(format_args!("{x:.1},{y:.1} "));
        }
        self.add(format_args!("\"/>\n"));
    }

    /// A path, if there is any.
    fn path(&mut self, class: &str, data: &str) {
        if !data.is_empty() {
            self.add(format_args!("<path class=\"{class}\" d=\"{data}\"/>\n"));
        }
    }

    /// Areas of one class, each from one corner to the opposite one.
    pub(super) fn areas(
        &mut self,
        class: &str,
        areas: impl Iterator<Item = ((f64, f64), (f64, f64))>,
    ) {
        let area = |(from, to): ((f64, f64), (f64, f64))| {
            let (left, bottom) = self.at(from.0, from.1);
            let (right, top) = self.at(to.0, to.1);
            let (width, height) = (right - left, bottom - top);
            format!("M{left:.1} {top:.1}h{width:.1}v{height:.1}h-{width:.1}z")
        };
        let data: String = areas.map(area).collect();
        self.path(class, &data);
    }

    /// The area between two lines, given as pairs of one place across and two up.
    pub(super) fn band(&mut self, class: &str, points: &[(f64, f64, f64)]) {
        let high = points.iter().map(|(x, _, high)| (*x, *high));
        let low = points.iter().rev().map(|(x, low, _)| (*x, *low));
        let corner = |(index, (x, y)): (usize, (f64, f64))| {
            let (x, y) = self.at(x, y);
            let command = if index == 0 { 'M' } else { 'L' };
            format!("{command}{x:.1} {y:.1}")
        };
        let data: String = high.chain(low).enumerate().map(corner).collect();
        self.path(class, &data);
    }

    /// Ticks above the plot; `tall` ones are seen from afar.
    pub(super) fn ticks(&mut self, class: &str, tall: bool, places: impl Iterator<Item = f64>) {
        let height = if tall { TICKS.1 } else { TICKS.0 };
        let tick = |x| format!("M{:.1} {}v-{height}", self.at(x, 0.0).0, TOP - 1.0);
        let data: String = places.map(tick).collect();
        self.path(&format!("tick {class}"), &data);
    }

    /// A line across the plot at a value, and what it is.
    pub(super) fn across(&mut self, class: &str, y: f64, text: &str) {
        let (left, right) = (LEFT, self.size.0 - RIGHT);
        let (_, y) = self.at(self.x.min, y);
        self.add(format_args!(
            "<path class=\"rule {class}\" d=\"M{left} {y:.1}H{right}\"/>\
             <text class=\"name {class} end\" x=\"{:.1}\" y=\"{:.1}\">{}</text>\n",
            right - 4.0,
            y - 4.0,
            escape(text)
        ));
    }

    /// A line up the plot at a place, and what it is.
    pub(super) fn up(&mut self, class: &str, x: f64, text: &str) {
        let (x, _) = self.at(x, self.y.min);
        let (top, bottom) = (TOP, self.size.1 - BOTTOM);
        // On the side where there is room.
        let (anchor, beside) = match x > (LEFT + self.size.0 - RIGHT) / 2.0 {
            true => (" end", x - 5.0),
            false => ("", x + 5.0),
        };
        self.add(format_args!(
            "<path class=\"rule {class}\" d=\"M{x:.1} {top}V{bottom}\"/>\
             <text class=\"name {class}{anchor}\" x=\"{beside:.1}\" y=\"{:.1}\">{}</text>\n",
            top + 14.0,
            escape(text)
        ));
    }

    /// The drawing with its axes.
    pub(super) fn finish(mut self) -> String {
        let body = std::mem::take(&mut self.body);
        let (width, height) = self.size;
        let (left, bottom) = (LEFT, height - BOTTOM);
        let (right, top) = (width - RIGHT, TOP);
        let name = escape(&self.name);
        self.add(format_args!(
            "<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{name}\">\n"
        ));
        let (x, y) = (self.x.clone(), self.y.clone());
        for (value, text) in &y.marks {
            let (_, at) = self.at(x.min, *value);
            self.add(format_args!(
                "<path class=\"grid\" d=\"M{left} {at:.1}H{right}\"/>\
                 <text class=\"end\" x=\"{:.1}\" y=\"{:.1}\">{text}</text>\n",
                left - 6.0,
                at + 4.0
            ));
        }
        for (value, text) in &x.marks {
            let (at, _) = self.at(*value, y.min);
            self.add(format_args!(
                "<path class=\"axis\" d=\"M{at:.1} {bottom}v4\"/>\
                 <text class=\"middle\" x=\"{at:.1}\" y=\"{:.1}\">{text}</text>\n",
                bottom + 17.0
            ));
        }
        self.body.push_str(&body);
        let (across, down) = ((left + right) / 2.0, (top + bottom) / 2.0);
        self.add(format_args!(
            "<path class=\"axis frame\" d=\"M{left} {top}V{bottom}H{right}\"/>\
             <text class=\"middle\" x=\"{across:.1}\" y=\"{:.1}\">{}</text>\
             <text class=\"middle\" transform=\"translate(12 {down:.1}) rotate(-90)\">{}</text>\n</svg>\n",
            height - 6.0,
            escape(&x.title),
            escape(&y.title)
        ));
        self.body
    }
}

/// Text as part of a document.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marks(axis: &Axis) -> Vec<&str> {
        axis.marks.iter().map(|(_, text)| text.as_str()).collect()
    }

    #[test]
    fn marks_are_round_numbers_up_to_the_end_of_the_axis() {
        let count = |max| Axis::count("", max);
        assert_eq!(marks(&count(10.0)), ["0", "2", "4", "6", "8", "10"]);
        assert_eq!(
            marks(&count(0.3)),
            ["0", "0.05", "0.1", "0.15", "0.2", "0.25", "0.3"]
        );
        assert_eq!(marks(&count(7e6)), ["0", "2M", "4M", "6M", "8M"]);
        assert_eq!(marks(&count(0.0)).first(), Some(&"0"));
        let bytes = Axis::bytes("", 4 << 30);
        assert_eq!(marks(&bytes), ["0 B", "1 GiB", "2 GiB", "3 GiB", "4 GiB"]);
        assert_eq!(marks(&Axis::bytes("", 0)), ["0 B", "1 B"]);
        let more = Axis::bytes("", (4 << 30) - 1);
        assert_eq!(marks(&more).last(), Some(&"4 GiB"));
        // There is nothing beyond the last mark, and nothing above it.
        for max in [1.0, 3.0, 6.7, 0.1 + 0.2, 99.9, 1e5 / 3.0] {
            let axis = count(max);
            let last = axis.marks.last().unwrap().0;
            assert!(
                (axis.max - last).abs() < 1e-6 && axis.max >= max * (1.0 - 1e-6),
                "{max}"
            );
        }
        for max in [1_u64, 3, 1000, (1 << 30) + 1, (3 << 30) - 1, 1088 << 20] {
            let bytes = Axis::bytes("", max);
            let last = bytes.marks.last().unwrap().0;
            assert!(bytes.max == last && last >= max as f64, "{max}");
        }
        assert_eq!(Axis::time(7.3).max, 7.3);
        let long = Axis::time(600.0);
        assert_eq!(marks(&long), ["0", "2", "4", "6", "8", "10"]);
        assert_eq!((long.max, long.marks[5].0), (600.0, 600.0));
        let decades = Axis::decades("", 0, 2, |ten| format!("1e{ten}"));
        assert_eq!(marks(&decades), ["1e0", "1e1", "1e2"]);
        let one = Axis::decades("", 0, 0, |ten| format!("1e{ten}"));
        assert_eq!(marks(&one), ["1e0", "1e1"]);
    }

    #[test]
    fn values_are_where_their_marks_are() {
        let mut chart = Chart::new(
            "a",
            Axis::count("x", 10.0),
            Axis::count("y", 4.0),
            (860.0, 154.0),
        );
        chart.line("c", [(0.0, 0.0), (10.0, 4.0), (5.0, 2.0)].into_iter());
        chart.areas("d", [((0.0, 0.0), (5.0, 4.0))].into_iter());
        chart.band("e", &[(0.0, 0.0, 2.0), (5.0, 2.0, 4.0)]);
        chart.ticks("f", false, [0.0, 5.0].into_iter());
        chart.across("g", 2.0, "<half>");
        chart.up("h", 2.5, "early");
        chart.up("i", 10.0, "late");
        let svg = chart.finish();
        for drawn in [
            "class=\"e\" d=\"M76.0 64.0L454.0 14.0L454.0 64.0L76.0 114.0\"",
            "class=\"tick f\" d=\"M76.0 13v-4M454.0 13v-4\"",
            "class=\"rule g\" d=\"M76 64.0H832\"",
            "x=\"828.0\" y=\"60.0\">&lt;half&gt;<",
            "class=\"rule h\" d=\"M265.0 14V114\"",
            "class=\"name h\" x=\"270.0\"",
            "class=\"name i end\" x=\"827.0\"",
        ] {
            assert!(svg.contains(drawn), "{drawn}: {svg}");
        }
        assert!(
            svg.contains("points=\"76.0,114.0 832.0,14.0 454.0,64.0 \""),
            "{svg}"
        );
        assert!(
            svg.contains("d=\"M76.0 14.0h378.0v100.0h-378.0z\""),
            "{svg}"
        );
    }

    #[test]
    fn text_stays_text() {
        assert_eq!(
            escape("<a b=\"c\">&'"),
            "&lt;a b=&quot;c&quot;&gt;&amp;&#39;"
        );
    }
}
