//! Framing: header and planes of a body product through an in-memory pipe, sender and receiver on one thread.
//!
//! `cargo bench -p benches --bench wire`. The planes are those of 1,024 tokens of the widths of SmolLM2-135M and
//! Llama-3.2-1B; what a socket and its encryption add is not in it.

#![allow(missing_docs)] // of the function that criterion_group! makes

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use protocol::he::{ParameterSet, Planes, Precision};
use protocol::ids::{Direction, Group, LinearId};
use protocol::wire::messages::{Operand, PROTOCOL_VERSION, ProductHeader};
use protocol::wire::{PREFIX_BYTES, PlanesShape, decode, encode, payload_length};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::runtime::Builder;

const TOKENS: u32 = 1024;
/// Bytes that the pipe holds, and that are written at a time.
const CHUNK_BYTES: usize = 256 * 1024;
/// More than any of the planes has.
const LIMIT: usize = 1 << 30;

fn header() -> ProductHeader {
    ProductHeader {
        version: PROTOCOL_VERSION,
        call: 1,
        product: LinearId { layer: 0, group: Group::Qkv }.along(Direction::Forward),
        precision: Precision::standard(ParameterSet::P32),
        operand: Operand::Body { tokens: TOKENS },
    }
}

async fn send(mut pipe: DuplexStream, body: &Planes) -> std::io::Result<()> {
    let frame = encode(&header()).expect("a header fits a frame");
    pipe.write_all(&frame).await?;
    for chunk in body.bytes().chunks(CHUNK_BYTES) {
        pipe.write_all(chunk).await?;
    }
    Ok(())
}

async fn receive(mut pipe: DuplexStream, inner: usize) -> std::io::Result<Planes> {
    let mut prefix = [0; PREFIX_BYTES];
    pipe.read_exact(&mut prefix).await?;
    let mut payload = vec![0; payload_length(prefix).expect("the prefix was encoded")];
    pipe.read_exact(&mut payload).await?;
    let header: ProductHeader = decode(&payload).expect("the header was encoded");
    let shape = PlanesShape::of_body(&header, inner, LIMIT).expect("the planes are small").expect("a body follows");
    let mut planes = shape.allocate();
    pipe.read_exact(planes.bytes_mut()).await?;
    Ok(planes)
}

fn body_product(criterion: &mut Criterion) {
    let runtime = Builder::new_current_thread().build().expect("a runtime without drivers");
    let mut group = criterion.benchmark_group("wire");
    for inner in [576, 2048] {
        let body = Planes::zeros_of_bits(header().operand_bits(), TOKENS as usize, inner);
        group.throughput(Throughput::Bytes(body.bytes().len() as u64));
        group.bench_function(format!("body/{TOKENS}x{inner}"), |bencher| {
            bencher.iter(|| {
                let (near, far) = tokio::io::duplex(CHUNK_BYTES);
                let moved = async { tokio::try_join!(send(near, &body), receive(far, inner)) };
                black_box(runtime.block_on(moved).expect("a pipe in memory does not break"))
            });
        });
    }
    group.finish();
}

/// A message without planes.
fn header_alone(criterion: &mut Criterion) {
    let header = header();
    criterion.bench_function("wire/header", |bencher| {
        bencher.iter(|| {
            let frame = encode(black_box(&header)).expect("a header fits a frame");
            decode::<ProductHeader>(&frame[PREFIX_BYTES..]).expect("the header was encoded")
        });
    });
}

criterion_group!(benches, body_product, header_alone);
criterion_main!(benches);
