-- What was said, and what waits for a person. This file can be run again at any time.

create schema if not exists agent;

-- The primary key is the proof that nothing is said twice: a second message in its place could not be stored.
create table if not exists agent.message (
    conversation text not null,
    number int not null,
    role text not null check (role in ('user', 'model', 'tools', 'system')),
    content jsonb not null,
    primary key (conversation, number)
);

-- Whoever approves finds here what to signal.
create table if not exists agent.approval (
    workflow uuid primary key,
    conversation text not null,
    token text not null,
    tool text not null,
    argument jsonb not null
);
