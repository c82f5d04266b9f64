//! Rotary positions as a `config.json` speaks of them: the older `rope_theta` and `rope_scaling`, the newer
//! `rope_parameters`, or several of them at once. What holds then is what Hugging Face's transformers 5 makes of them, and
//! one line says so.

use super::Family;
use super::rope::{Llama3RopeScaling, LongRopeScaling, Rope, RopeScaling, YarnRopeScaling};
use super::settings::Settings;
use crate::model::error::ModelError;

/// What the rules need to know beside the settings.
pub(super) struct RopeReader<'a> {
    pub(super) family: &'static Family,
    pub(super) settings: Settings<'a>,
    pub(super) head_dim: usize,
    pub(super) max_positions: usize,
    /// One line for each statement that contradicts another.
    pub(super) notes: &'a mut Vec<String>,
}

const SCALING: (&str, &str) = ("rope_scaling", "rope_scaling.");
const PARAMETERS: (&str, &str) = ("rope_parameters", "rope_parameters.");

impl<'a> RopeReader<'a> {
    /// The rotary positions of all layers, and those of the layers with a window where they differ.
    pub(super) fn read(mut self) -> Result<(Rope, Option<Rope>), ModelError> {
        let scaling = self.settings.table(SCALING.0, SCALING.1)?;
        let parameters = self.settings.table(PARAMETERS.0, PARAMETERS.1)?;
        if let Some(local_theta) = self.family.defaults.local_rope_theta {
            return self.by_kind(scaling, parameters, local_theta);
        }
        let table = match (scaling.filter(|table| !table.is_empty()), parameters) {
            (Some(scaling), Some(parameters)) => {
                if !scaling.same_as(parameters) {
                    self.note("rope_scaling and rope_parameters differ: rope_scaling is taken".to_owned());
                }
                Some(scaling)
            }
            (Some(table), None) | (None, Some(table)) => Some(table),
            (None, None) => None,
        };
        let outside = self.settings.number("rope_theta")?;
        let inside = table.map(|table| table.number("rope_theta")).transpose()?.flatten();
        if let (Some(outside), Some(inside)) = (outside, inside)
            && outside != inside
        {
            self.note(format!(
                "rope_theta is {outside} beside {inside} in the table of rotary positions: {inside} is taken"
            ));
        }
        let theta = inside.or(outside).unwrap_or(self.family.defaults.rope_theta);
        Ok((self.one(table, theta)?, None))
    }

    /// Layers with a window have rotary positions of their own (Gemma 3).
    fn by_kind(
        &mut self,
        scaling: Option<Settings<'a>>,
        parameters: Option<Settings<'a>>,
        local_theta: f64,
    ) -> Result<(Rope, Option<Rope>), ModelError> {
        let kind = |name, prefix| parameters.map(|table| table.table(name, prefix)).transpose().map(Option::flatten);
        let full = kind("full_attention", "rope_parameters.full_attention.")?;
        let local = kind("sliding_attention", "rope_parameters.sliding_attention.")?;
        let theta = |table: Option<Settings<'_>>, outside: &str, default: f64| {
            let inside = table.map(|table| table.number("rope_theta")).transpose()?.flatten();
            Ok::<_, ModelError>(inside.or(self.settings.number(outside)?).unwrap_or(default))
        };
        let global_theta = theta(full, "rope_theta", self.family.defaults.rope_theta)?;
        let local_theta = theta(local, "rope_local_base_freq", local_theta)?;
        if let (Some(scaling), Some(full)) = (scaling, full)
            && !scaling.same_as(full)
        {
            self.note("rope_scaling and rope_parameters.full_attention differ: rope_scaling is taken".to_owned());
        }
        let global = self.one(scaling.or(full), global_theta)?;
        Ok((global, Some(self.one(local, local_theta)?)))
    }

    fn note(&mut self, what: String) {
        self.notes.push(format!("config.json: {what}, as Hugging Face does"));
    }

    fn one(&mut self, table: Option<Settings<'a>>, theta: f64) -> Result<Rope, ModelError> {
        let kind = match table {
            None => None,
            Some(table) => match table.text("rope_type")? {
                Some(kind) => Some(kind),
                None => table.text("type")?,
            },
        };
        let kind = match kind {
            // Phi-3's first files called it so.
            Some("su" | "yarn") if self.family.defaults.original_context.is_some() => "longrope",
            Some(kind) => kind,
            None => "default",
        };
        let inside = table.map(|table| table.number("partial_rotary_factor")).transpose()?.flatten();
        let part = inside.or(self.settings.number("partial_rotary_factor")?).unwrap_or(1.0);
        let mut features = (self.head_dim as f64 * part) as usize;
        if features != self.head_dim && !self.family.partial_rotary {
            // Its attention turns whole heads whatever the setting says; only a scaling would go by it, and then fail.
            if kind != "default" {
                let what = format!(
                    "partial_rotary_factor is {part}, but attention of `{}` turns whole heads",
                    self.family.model_type
                );
                return Err(self.settings.fail(what));
            }
            self.note(format!("partial_rotary_factor is {part}: heads are turned whole"));
            features = self.head_dim;
        }
        let Some(table) = table.filter(|_| kind != "default") else { return Ok(Rope::plain(theta, features)) };
        let scaling = match kind {
            "linear" => RopeScaling::Linear { factor: table.need_number("factor")? },
            "dynamic" => RopeScaling::Dynamic { factor: table.need_number("factor")?, context: self.max_positions },
            "llama3" => RopeScaling::Llama3(Llama3RopeScaling {
                factor: table.need_number("factor")?,
                low_freq_factor: table.need_number("low_freq_factor")?,
                high_freq_factor: table.need_number("high_freq_factor")?,
                original_max_position_embeddings: self.context(table)?,
            }),
            "yarn" => RopeScaling::Yarn(self.yarn(table)?),
            "longrope" => RopeScaling::LongRope(self.long(table)?),
            other => {
                return Err(self.settings.fail(format!(
                    "the rope_scaling type is `{other}`; `default`, `linear`, `dynamic`, `llama3`, `yarn` and `longrope` are \
                     supported"
                )));
            }
        };
        Ok(Rope { theta, features, scaling: Some(scaling) })
    }

    /// The context that a model was first trained with.
    fn context(&mut self, table: Settings<'a>) -> Result<usize, ModelError> {
        const NAME: &str = "original_max_position_embeddings";
        let (inside, outside) = (table.count(NAME)?, self.settings.count(NAME)?);
        let outside = outside.or(self.family.defaults.original_context);
        if let (Some(inside), Some(outside)) = (inside, outside)
            && inside != outside
        {
            self.note(format!(
                "{NAME} is {outside} beside {inside} in the table of rotary positions: {outside} is taken"
            ));
        }
        Ok(outside.or(inside).unwrap_or(self.max_positions))
    }

    fn yarn(&mut self, table: Settings<'a>) -> Result<YarnRopeScaling, ModelError> {
        let factor = table.need_number("factor")?;
        let usual = YarnRopeScaling::usual_attention_factor;
        let not_zero = |value: Option<f64>| value.filter(|&value| value != 0.0);
        let attention_factor = match table.number("attention_factor")? {
            Some(given) => given,
            None => match (not_zero(table.number("mscale")?), not_zero(table.number("mscale_all_dim")?)) {
                (Some(one), Some(all)) => usual(factor, one) / usual(factor, all),
                _ => usual(factor, 1.0),
            },
        };
        Ok(YarnRopeScaling {
            factor,
            attention_factor,
            beta_fast: not_zero(table.number("beta_fast")?).unwrap_or(32.0),
            beta_slow: not_zero(table.number("beta_slow")?).unwrap_or(1.0),
            context: self.context(table)?,
            truncate: table.flag("truncate")?.unwrap_or(true),
        })
    }

    fn long(&mut self, table: Settings<'a>) -> Result<LongRopeScaling, ModelError> {
        let context = self.context(table)?;
        let ratio = self.max_positions as f64 / context.max(1) as f64;
        let factor = table.number("factor")?.unwrap_or(ratio);
        let usual = || LongRopeScaling::usual_attention_factor(factor, context);
        Ok(LongRopeScaling {
            short: table.need_numbers("short_factor")?,
            long: table.need_numbers("long_factor")?,
            context,
            attention_factor: table.number("attention_factor")?.unwrap_or_else(usual),
        })
    }
}
