-- What the service writes in the transactions that start and signal workflows. This file can be run again at any time.

create schema if not exists web;

create table if not exists web.purchase (
    ref text primary key,
    article text not null,
    cents int not null check (cents between 1 and 1000000)
);

create table if not exists web.decision (
    ref text primary key references web.purchase,
    approved boolean not null,
    by text not null
);
