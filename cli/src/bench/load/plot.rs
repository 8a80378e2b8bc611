//! Plots as SVG that stands in a page by itself.

use std::fmt::Write;

const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 260.0;
/// Room for labels: left, right, top, bottom.
const MARGIN: [f64; 4] = [58.0, 12.0, 10.0, 40.0];

/// How values become positions along an axis.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Scale {
    Linear,
    Log,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Shape {
    Line,
    Dots,
}

#[derive(Debug)]
pub(super) struct Series {
    pub(super) name: &'static str,
    pub(super) shape: Shape,
    pub(super) points: Vec<(f64, f64)>,
}

/// Series over common axes.
#[derive(Debug)]
pub(super) struct Plot {
    pub(super) x: (&'static str, Scale),
    pub(super) y: (&'static str, Scale),
    pub(super) series: Vec<Series>,
}

/// One axis: values from `low` to `high` on `from` to `to`.
struct Axis {
    scale: Scale,
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Axis {
    fn new(scale: Scale, values: impl Iterator<Item = f64>, from: f64, to: f64) -> Self {
        let (low, high) = values
            .filter(|value| value.is_finite() && (scale == Scale::Linear || *value > 0.0))
            .fold((f64::INFINITY, 0.0_f64), |(low, high), value| (low.min(value), high.max(value)));
        let (low, high) = match scale {
            Scale::Linear => (0.0, if high > 0.0 { high } else { 1.0 }),
            Scale::Log if low > high => (1.0, 10.0),
            Scale::Log => (low, high.max(low * 2.0)),
        };
        Self { scale, low, high, from, to }
    }

    fn position(&self, value: f64) -> f64 {
        let share = match self.scale {
            Scale::Linear => (value - self.low) / (self.high - self.low),
            Scale::Log => (value.max(self.low) / self.low).ln() / (self.high / self.low).ln(),
        };
        self.from + share.clamp(0.0, 1.0) * (self.to - self.from)
    }

    /// Round values within the axis, some five of them.
    fn ticks(&self) -> Vec<f64> {
        let steps = [1.0, 2.0, 5.0];
        let powers = |from: f64, to: f64| from.log10().floor() as i32..=to.log10().ceil() as i32;
        let round = |from: f64, to: f64| {
            powers(from, to).flat_map(move |power| steps.map(|step| step * 10f64.powi(power))).collect::<Vec<_>>()
        };
        match self.scale {
            Scale::Linear => {
                let least = self.high / 6.0;
                let step = round(least, self.high).into_iter().find(|step| *step >= least).unwrap_or(self.high);
                (0..=6).map(|index| f64::from(index) * step).filter(|tick| *tick <= self.high * 1.0001).collect()
            }
            Scale::Log => {
                let all: Vec<f64> = round(self.low, self.high);
                let mut within: Vec<f64> =
                    all.into_iter().filter(|tick| (self.low..=self.high).contains(tick)).collect();
                if within.len() > 8 {
                    within.retain(|tick| (tick.log10() - tick.log10().round()).abs() < 1e-9);
                }
                within
            }
        }
    }
}

impl Plot {
    /// Draws it. Colours and fonts are the page's: `.s0`, `.s1`, … for series, `.axis` for the rest.
    pub(super) fn svg(&self) -> String {
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let [left, right, top, bottom] = MARGIN;
        let points = || self.series.iter().flat_map(|series| &series.points);
        let x = Axis::new(self.x.1, points().map(|point| point.0), left, WIDTH - right);
        let y = Axis::new(self.y.1, points().map(|point| point.1), HEIGHT - bottom, top);
        write!(out, "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\"><g class=\"axis\">")?;
        for tick in x.ticks() {
            let (at, end) = (x.position(tick), y.from);
            write!(out, "<path d=\"M{at:.1} {top}V{end}\"/>")?;
            write!(out, "<text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>", end + 14.0, label(tick))?;
        }
        for tick in y.ticks() {
            let (at, end) = (y.position(tick), x.to);
            write!(out, "<path d=\"M{left} {at:.1}H{end}\"/>")?;
            write!(out, "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>", left - 5.0, at + 4.0, label(tick))?;
        }
        let (middle, below) = ((x.from + x.to) / 2.0, HEIGHT - 8.0);
        write!(out, "<text x=\"{middle}\" y=\"{below}\" text-anchor=\"middle\">{}</text>", self.x.0)?;
        let middle = (y.from + y.to) / 2.0;
        let turned = format!("transform=\"translate(13 {middle}) rotate(-90)\" text-anchor=\"middle\"");
        write!(out, "<text {turned}>{}</text></g>", self.y.0)?;
        for (index, series) in self.series.iter().enumerate() {
            let at = |&(a, b): &(f64, f64)| (x.position(a), y.position(b));
            match series.shape {
                Shape::Line => {
                    write!(out, "<polyline class=\"line s{index}\" points=\"")?;
                    series.points.iter().map(at).try_for_each(|(a, b)| write!(out, "{a:.1},{b:.1} "))?;
                    write!(out, "\"/>")?;
                }
                Shape::Dots => {
                    write!(out, "<path class=\"dots s{index}\" d=\"")?;
                    series.points.iter().map(at).try_for_each(|(a, b)| write!(out, "M{a:.1} {b:.1}h0"))?;
                    write!(out, "\"/>")?;
                }
            }
            if self.series.len() > 1 {
                let (name, row) = (series.name, top + 14.0 + 15.0 * index as f64);
                write!(out, "<text class=\"key s{index}\" x=\"{}\" y=\"{row}\">{name}</text>", left + 8.0)?;
            }
        }
        write!(out, "</svg>")
    }
}

fn label(value: f64) -> String {
    match value {
        value if value >= 1e6 => format!("{}M", value / 1e6),
        value if value >= 1e4 => format!("{}k", value / 1e3),
        // Sums of steps such as 0.1 are not round in binary.
        value => format!("{}", (value * 1e6).round() / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_ticks(scale: Scale, values: &[f64], expected: &[f64]) {
        let ticks = Axis::new(scale, values.iter().copied(), 0.0, 100.0).ticks();
        assert_eq!(
            ticks.iter().copied().map(label).collect::<Vec<_>>(),
            expected.iter().copied().map(label).collect::<Vec<_>>()
        );
    }

    #[test]
    fn ticks_are_round_and_few() {
        check_ticks(Scale::Linear, &[3.0, 97.0], &[0.0, 20.0, 40.0, 60.0, 80.0]);
        check_ticks(Scale::Linear, &[0.6], &[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]);
        check_ticks(Scale::Linear, &[], &[0.0, 0.2, 0.4, 0.6, 0.8, 1.0]);
        check_ticks(Scale::Log, &[3.0, 97.0], &[5.0, 10.0, 20.0, 50.0]);
        check_ticks(Scale::Log, &[0.5, 90_000.0], &[1.0, 10.0, 100.0, 1000.0, 10_000.0]);
        check_ticks(Scale::Log, &[0.0], &[1.0, 2.0, 5.0, 10.0]);
    }

    #[test]
    fn points_lie_where_their_values_say() {
        let axis = Axis::new(Scale::Log, [1.0, 100.0].into_iter(), 0.0, 100.0);
        assert_eq!(
            [0.0, 1.0, 10.0, 100.0, 1e9].map(|value| axis.position(value).round()),
            [0.0, 0.0, 50.0, 100.0, 100.0]
        );
        let line = Series { name: "a", shape: Shape::Line, points: vec![(0.0, 0.0), (1.0, 1.0)] };
        let svg = Plot { x: ("x", Scale::Linear), y: ("y", Scale::Linear), series: vec![line] }.svg();
        assert!(svg.contains("points=\"58.0,220.0 548.0,10.0 \""), "{svg}");
    }
}
