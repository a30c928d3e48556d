"""A text model's chat template that also takes images: the model's own, with a placeholder where an image part stands.

Qwen3's template writes nothing at all for a message whose content is a list of typed parts, and Qwen2.5's stops with
a TypeError. So the parts are joined to one string first, and the model's own template then reads strings only.
"""

_JOINING = """\
{%- set joined = namespace(messages=[], text='') -%}
{%- for message in messages -%}
    {%- if message['content'] is string or not message['content'] -%}
        {%- set joined.messages = joined.messages + [message] -%}
    {%- else -%}
        {%- set joined.text = '' -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}
                {%- set joined.text = joined.text + 'IMAGE_TOKEN' -%}
            {%- elif part['type'] == 'text' -%}
                {%- set joined.text = joined.text + part['text'] -%}
            {%- else -%}
                {{- raise_exception('a message holds a part of type ' + part['type'] + ', neither text nor image') -}}
            {%- endif -%}
        {%- endfor -%}
        {%- set joined.messages = joined.messages + [dict(message, content=joined.text)] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = joined.messages -%}
"""
# Models that think by default would fill a short answer with thoughts. Whoever asks for thoughts gets them.
_WITHOUT_THOUGHTS = "{%- set enable_thinking = enable_thinking is defined and enable_thinking -%}\n"


def with_images(template: str, image_token: str) -> str:
    """The template with image parts.

    Args:
        template: Jinja source of a text-only model's chat template.
        image_token: what stands for an image in the text.

    Returns:
        Jinja source. What the template makes of messages without images stays, but that a template with a switch for
        thinking (`enable_thinking`, Qwen3's) has it off unless it is given.
    """
    return _JOINING.replace("IMAGE_TOKEN", image_token) + without_thoughts(template)


def without_thoughts(template: str) -> str:
    """The template with its switch for thinking off unless it is given; as it is where it has none."""
    return _WITHOUT_THOUGHTS + template if "enable_thinking" in template else template
