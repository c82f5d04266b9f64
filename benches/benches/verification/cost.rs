//! What verification costs the owner: once a run, and in every call.

use std::hint::black_box;
use std::sync::Arc;

use protocol::model::Model;
use protocol::quant::{PrecisionTarget, Step, serve};

use crate::products::{Product, SEED};
use crate::record::Rows;
use crate::timed;

pub(crate) fn measure(model: &Arc<Model>, rows: &Rows) -> anyhow::Result<()> {
    let linears: Vec<_> = model.config().linears().collect();
    let (mut serving, mut drawing, mut checking, mut memory) = (0.0, 0.0, 0.0, 0);
    let (mut expecting, mut verifying, mut sealing, mut opening) = (0.0, 0.0, 0.0, 0.0);
    for &linear in &linears {
        let (seconds, served) = timed(|| anyhow::Ok(serve(model.linear(linear)?, model.config().shape(linear.group))?));
        serving += seconds;
        let (matrix, _) = served?;
        let (seconds, checks) = timed(|| protocol::sketch::Checks::draw(&matrix.values, matrix.shape));
        drawing += seconds;
        memory += checks?.iter().map(protocol::sketch::Checks::memory_bytes).sum::<usize>();
        for product in Product::of(model, linear)? {
            let masks = product.masks(|_| {})?;
            let verify = || product.checks.masks.verify(masks, &SEED, &product.domain(), product.precision.mask_limbs);
            let (seconds, masks) = timed(verify);
            checking += seconds;
            let masks = Arc::new(masks?);

            // No gradient is asked for below the lowest adapter.
            let Some((rows, tokens)) = rows.get(&product.id) else { continue };
            let (sealed, sent) = timed(|| product.send(rows, Step::Sketched));
            let sent = sent?;
            let mut sums = vec![[0.0; protocol::sketch::COLUMNS]; *tokens];
            let (expected, ()) = timed(|| product.checks.sketch.expect(black_box(&sent.rows), &mut sums));
            let answer = product.answer(&product.held, &sent)?;
            let (opened, decrypted) = timed(|| product.decrypt(sent.ticket, &masks, &answer));
            let decrypted = decrypted?;
            let decode = product.codec.decoder(&sent.scales);
            let (verified, values) = timed(|| product.checks.sketch.verify(decrypted, &sent.expected, decode));
            // What the same takes without being verified, which costs as much for any values.
            let mut values = values?.values().to_vec();
            let (decoded, result) = timed(|| product.codec.finish(&mut values, &sent.scales));
            result?;
            sealing += sealed;
            opening += opened + verified;
            expecting += expected;
            verifying += verified - decoded;
        }
    }
    let parameters = PrecisionTarget::default();
    println!("{} matrices, precision target {}", linears.len(), parameters.factor);
    println!("once a run: {serving:.2} core-s to read and quantise, {drawing:.2} core-s to draw the checks,");
    println!("            {checking:.2} core-s to check all mask products, {:.1} MB of checks", memory as f64 / 1e6);
    println!("each step:  {sealing:.2} core-s to rotate, expect, encode and encrypt, {expecting:.3} of it to expect");
    println!(
        "            {opening:.2} core-s to decrypt, verify, scale and rotate back, {verifying:.3} of it to verify"
    );
    let share = (expecting + verifying) / (sealing + opening);
    println!("            checks are {:.1} % of the cryptography", 100.0 * share);
    Ok(())
}
