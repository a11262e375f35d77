// Condition maps, fragment stage: writes the normal, albedo and rendered map in one pass.
//
// In:  interpolated_normal, grid   as the vertex stage writes them
//      face_texture                RGB float, row 0 is the top of the image (v = 1); fetched texel by texel
//      light[9]                    RGB spherical-harmonic coefficients, order 1, x, y, z, xy, xz, yz, x2-y2, 3z2-1
// Out: three float targets, alpha 1 where a face is. Clear them to 0, depth to 1; depth test LESS, no culling.
//
// Values are neither clamped nor remapped: normals reach -1, rendered may exceed 1.

precision highp float;
precision highp int;
precision highp sampler2D;

uniform sampler2D face_texture;
uniform vec3 light[9];

in vec3 interpolated_normal;
in vec2 grid;

layout(location = 0) out vec4 normal_map;
layout(location = 1) out vec4 albedo_map;
layout(location = 2) out vec4 rendered_map;

// Spherical harmonics times the cosine lobe (Ramamoorthi and Hanrahan 2001), the constant term without its pi.
const float CONSTANT = 0.28209479;   // sqrt(1/4pi)
const float LINEAR = 1.02332671;     // 2pi/3 sqrt(3/4pi)
const float PRODUCT = 0.85808553;    // pi/4 sqrt(15/4pi)
const float DIFFERENCE = 0.42904277; // pi/4 sqrt(15/16pi)
const float ZONAL = 0.24770796;      // pi/4 sqrt(5/16pi)

// One texel, 0 beyond the edge.
vec3 texel(ivec2 at, ivec2 size) {
    bool inside = all(greaterThanEqual(at, ivec2(0))) && all(lessThan(at, size));
    return inside ? texelFetch(face_texture, at, 0).rgb : vec3(0.0);
}

// Bilinear by hand: ES has no filtering of float textures, and samplers round the weights to 8 bits.
vec3 sample_texture(vec2 grid) {
    ivec2 size = textureSize(face_texture, 0);
    vec2 position = ((grid + 1.0) * vec2(size) - 1.0) * 0.5;
    vec2 corner = floor(position);
    vec2 part = position - corner;
    ivec2 at = ivec2(corner);
    vec3 top = mix(texel(at, size), texel(at + ivec2(1, 0), size), part.x);
    vec3 bottom = mix(texel(at + ivec2(0, 1), size), texel(at + ivec2(1, 1), size), part.x);
    return mix(top, bottom, part.y);
}

// Diffuse light on a surface; the normal need not be of unit length.
vec3 shade(vec3 n) {
    return CONSTANT * light[0]
        + LINEAR * (light[1] * n.x + light[2] * n.y + light[3] * n.z)
        + PRODUCT * (light[4] * n.x * n.y + light[5] * n.x * n.z + light[6] * n.y * n.z)
        + DIFFERENCE * light[7] * (n.x * n.x - n.y * n.y)
        + ZONAL * light[8] * (3.0 * n.z * n.z - 1.0);
}

void main() {
    vec3 albedo = sample_texture(grid);
    normal_map = vec4(interpolated_normal, 1.0);
    albedo_map = vec4(albedo, 1.0);
    rendered_map = vec4(albedo * shade(interpolated_normal), 1.0);
}
