//! The plot of a run: training and evaluation loss against steps.
//!
//! Drawn as SVG with the text left to the viewer's fonts, so that no font has to be found, here or on a server.

use std::ops::Range;

use anyhow::anyhow;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

const SIZE: (u32, u32) = (860, 500);
/// Two colours that stay apart for colour-blind readers and in grey.
const TRAINING: RGBColor = RGBColor(31, 102, 173);
const EVALUATION: RGBColor = RGBColor(214, 96, 20);
const INK: RGBColor = RGBColor(50, 50, 50);

/// Draws `training` and `evaluation`, as (step, loss), into an SVG document with `title` above it.
///
/// Points that are not finite are left out; without any point the plot says so.
///
/// # Errors
/// When the drawing library fails, which it does not when it draws into memory.
pub fn loss_svg(title: &str, training: &[(u32, f64)], evaluation: &[(u32, f64)]) -> anyhow::Result<String> {
    let finite = |points: &[(u32, f64)]| -> Vec<(f64, f64)> {
        points.iter().filter(|(_, loss)| loss.is_finite()).map(|&(step, loss)| (f64::from(step), loss)).collect()
    };
    let mut svg = String::new();
    draw(&mut svg, title, &finite(training), &finite(evaluation)).map_err(|error| anyhow!("{PLOT}: {error}"))?;
    Ok(svg)
}

const PLOT: &str = "the loss cannot be plotted";

type Failure = Box<dyn std::error::Error>;

fn draw(svg: &mut String, title: &str, training: &[(f64, f64)], evaluation: &[(f64, f64)]) -> Result<(), Failure> {
    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let text = |size: u32| ("sans-serif", size).into_font().color(&INK);
    let (steps, losses) = ranges(training, evaluation);
    let step_labels = steps.end.min(10.0) as usize + 1;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, text(20))
        .margin(16)
        .margin_right(28)
        .x_label_area_size(46)
        .y_label_area_size(62)
        .build_cartesian_2d(steps, losses)?;
    chart
        .configure_mesh()
        .x_desc("optimiser step")
        .y_desc("mean loss per token (nats)")
        .x_labels(step_labels)
        .y_labels(8)
        .x_label_formatter(&|step| if step.fract() == 0.0 { format!("{step}") } else { String::new() })
        .y_label_formatter(&|loss| if loss.abs() < 1e4 { format!("{loss:.2}") } else { format!("{loss:.1e}") })
        .max_light_lines(1)
        .bold_line_style(RGBColor(222, 222, 222))
        .light_line_style(WHITE)
        .axis_style(RGBColor(140, 140, 140))
        .label_style(text(14))
        .axis_desc_style(text(16))
        .draw()?;
    if training.is_empty() && evaluation.is_empty() {
        let centre = (SIZE.0 as i32 / 2, SIZE.1 as i32 / 2);
        area.draw(&Text::new("no step was finished", centre, text(18).pos(Pos::new(HPos::Center, VPos::Center))))?;
    }
    for (label, points, colour, radius) in
        [("training", training, TRAINING, 2), ("evaluation (held out)", evaluation, EVALUATION, 4)]
    {
        if points.is_empty() {
            continue;
        }
        chart.draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?.label(label).legend(
            move |(x, y)| {
                let line = PathElement::new([(x, y), (x + 22, y)], colour.stroke_width(2));
                EmptyElement::at((0, 0)) + line + Circle::new((x + 11, y), radius, colour.filled())
            },
        );
        chart.draw_series(points.iter().map(|&point| Circle::new(point, radius, colour.filled())))?;
    }
    if !(training.is_empty() && evaluation.is_empty()) {
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .margin(12)
            .legend_area_size(30)
            .background_style(WHITE.mix(0.9))
            .border_style(RGBColor(200, 200, 200))
            .label_font(text(14))
            .draw()?;
    }
    area.present()?;
    Ok(())
}

/// Ranges of both axes, never empty, with a little room above and below the curves.
fn ranges(training: &[(f64, f64)], evaluation: &[(f64, f64)]) -> (Range<f64>, Range<f64>) {
    let points = || training.iter().chain(evaluation);
    let last = points().map(|&(step, _)| step).fold(1.0, f64::max);
    let low = points().map(|&(_, loss)| loss).fold(f64::INFINITY, f64::min);
    let high = points().map(|&(_, loss)| loss).fold(f64::NEG_INFINITY, f64::max);
    if low > high {
        return (0.0..last, 0.0..1.0);
    }
    // Half the span is halved first: the whole one may overflow when a diverged run reaches the largest numbers.
    let room = (0.08 * (high * 0.5 - low * 0.5) * 2.0).max(0.02 * high.abs()).clamp(0.01, 1e300);
    (0.0..last, (low - room).max(-1e300)..(high + room).min(1e300))
}
